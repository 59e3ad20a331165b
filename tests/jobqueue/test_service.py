"""The client against a real server and a real storage: submit all of it or nothing, look, cancel."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from helpers import SUCCEEDED, must_claim, new_job, snapshot, submit, wait_for

from jobqueue.broker import make_app, queue_name, send_tokens
from jobqueue.errors import BusyError, CapacityError, DataError, NotFoundError, ServerError, StorageError
from jobqueue.job import Batch, FailureReason, JobState, Settlement
from jobqueue.memory import GIB
from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.sweeper import Sweeper

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}
SWEEP = {
    "name": "b", "base_model": "owner/name-1B", "data": {"source": "rows.jsonl"},
    "evaluation": {"source": "rows.jsonl"}, "resources": {"memory": "4GiB"},
}  # fmt: skip
WORKER = {"host": "h", "device": "NVIDIA", "uuid": "", "slots": 1, "running": [], "every_s": 5}


@pytest.fixture
def client(settings: Settings) -> Client:
    return Client(settings)


def send(client: Client, folder: Path, *, force: bool = False, again: bool = True, **changes: object) -> Batch:
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({**SWEEP, **changes}))
    return client.submit(client.plan(client.read(file)), force=force, again=again)


def nothing_was_written(client: Client) -> bool:
    return snapshot(client.store.url) == {} and not Path(client.settings.storage_url).exists()


def test_a_batch_is_submitted_with_its_data_and_the_workers_are_woken(client: Client, tmp_path: Path) -> None:
    batch = send(client, tmp_path)

    assert (batch.name, batch.owner, batch.trials, batch.base_model) == ("b", "tester", 1, "owner/name-1B")
    train = client.job("b.1")
    stored = client.storage.fetch_source(train.spec["data"]["source"], tmp_path / "fetched")
    assert Path(stored).read_bytes() == (tmp_path / "rows.jsonl").read_bytes()
    assert client.store.tokens(queue_name("gpu8")) == 2  # the train job and the evaluation of the base model
    assert client.job("b.1.eval").spec["adapter_job"] == "b.1"
    assert client.job("b.report").spec == {"kind": "report", "batch": "b", "votes": [], "notify": []}


def test_a_name_that_is_taken_gets_a_number(client: Client, tmp_path: Path) -> None:
    names = [send(client, tmp_path).name for _ in range(3)]

    assert names == ["b", "b-2", "b-3"]
    assert client.job("b-3.1.eval").spec["adapter_job"] == "b-3.1"
    assert [batch.name for batch in client.batches()] == ["b-3", "b-2", "b"]


def test_the_same_plan_sent_twice_is_one_batch_and_another_owner_or_other_data_is_not(
    client: Client, tmp_path: Path
) -> None:
    first = send(client, tmp_path, again=False)
    before = snapshot(client.store.url)
    assert send(client, tmp_path, again=False) == first
    assert snapshot(client.store.url) == before
    assert client.find(client.plan(client.read(tmp_path / "sweep.yaml"))) == first

    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "question": "another?"}) + "\n")
    plan = client.plan(client.read(tmp_path / "sweep.yaml"))
    assert client.find(plan) is None
    assert client.submit(plan).name == "b-2"
    colleague = Client(replace(client.settings, owner="colleague"))
    assert colleague.submit(plan).name == "b-3"


def test_a_name_under_which_the_storage_has_results_of_another_server_is_taken(client: Client, tmp_path: Path) -> None:
    client.storage.write_text("batches/b/b.1/1-aa/manifest.json", "{}")

    assert send(client, tmp_path).name == "b-2"


def test_braces_in_a_users_names_are_the_users(client: Client, tmp_path: Path) -> None:
    (tmp_path / "{batch}.jsonl").write_text(json.dumps({"{batch}": "?", **ROW}) + "\n")
    data = {"source": "{batch}.jsonl", "columns": {"question": "{batch}"}}
    send(client, tmp_path, data=data, evaluation={"source": "owner/{batch}"})

    train = client.job("b.1").spec
    assert train["data"]["source"].endswith("/{batch}.jsonl")
    assert train["data"]["columns"] == {"question": "{batch}"}
    assert client.job("b.1.eval").spec["evaluation"]["source"] == "owner/{batch}"


@pytest.mark.parametrize("content", [None, "", '{"words": 1}\n'])
def test_a_data_file_that_cannot_be_used_leaves_nothing_behind(
    client: Client, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "other.jsonl").write_text(content)

    with pytest.raises(DataError):
        send(client, tmp_path, data={"source": "other.jsonl"})
    assert nothing_was_written(client)


def test_a_storage_that_cannot_be_written_leaves_nothing_in_the_store(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    client = Client(replace(settings, storage=str(tmp_path / "file")))

    with pytest.raises(StorageError):
        send(client, tmp_path)
    assert snapshot(client.store.url) == {}


def test_without_a_server_nothing_is_uploaded(settings: Settings, tmp_path: Path) -> None:
    client = Client(replace(settings, redis_url="redis://127.0.0.1:1/0"))

    with pytest.raises(ServerError):
        send(client, tmp_path)
    assert not Path(client.settings.storage_url).exists()


def test_tokens_that_cannot_be_sent_are_only_tokens() -> None:
    app = make_app("redis://127.0.0.1:1/0", 5)
    app.conf.broker_connection_timeout = 0.1

    send_tokens(app, ["gpu8", "gpu8"])


# -- capacity


def test_a_job_that_no_living_worker_can_hold_is_refused_before_anything_is_written(
    client: Client, tmp_path: Path
) -> None:
    client.store.heartbeat("h/gpu0", "gpu", {**WORKER, "usable_bytes": 3 * GIB})
    client.store.heartbeat("h/gpu9", "gpu", {**WORKER, "usable_bytes": 80 * GIB, "every_s": 0})
    before = snapshot(client.store.url)

    with pytest.raises(CapacityError, match=r"needs about 4\.0 GiB, and the largest worker has 3\.0 GiB"):
        send(client, tmp_path)
    assert snapshot(client.store.url) == before
    assert not Path(client.settings.storage_url).exists()

    assert send(client, tmp_path, force=True).name == "b"


def test_a_job_for_a_gpu_is_refused_where_cpus_alone_are_alive(client: Client, tmp_path: Path) -> None:
    client.store.heartbeat("h/cpu", "cpu", {**WORKER, "device": "cpu", "usable_bytes": 80 * GIB})

    with pytest.raises(CapacityError, match="asks for a GPU"):
        send(client, tmp_path, resources={"memory": "4GiB", "device": "gpu"})
    assert send(client, tmp_path, resources={"memory": "4GiB", "device": "cpu"}).name == "b"


@pytest.mark.parametrize("usable", [None, 4 * GIB])
def test_a_job_is_taken_where_a_worker_holds_it_or_none_is_there_yet(
    client: Client, tmp_path: Path, usable: int | None
) -> None:
    client.store.heartbeat("h/control", "control", {**WORKER, "device": "control", "usable_bytes": 0})
    if usable:
        client.store.heartbeat("h/gpu0", "gpu", {**WORKER, "usable_bytes": usable})

    assert send(client, tmp_path).name == "b"


# -- cancelling


@pytest.mark.parametrize("name", ["b", "base-or-not", "base-0123456789ab"])
def test_a_cancelled_batch_is_cancelled_as_a_whole_whatever_its_name(client: Client, tmp_path: Path, name: str) -> None:
    send(client, tmp_path, name=name)

    assert client.cancel(name)

    assert client.batch(name).states == {JobState.CANCELLED: 4}
    assert client.cancel(name) == []


def test_the_evaluation_of_a_base_model_goes_on_while_another_batch_waits_for_it(
    client: Client, tmp_path: Path
) -> None:
    send(client, tmp_path)
    send(client, tmp_path)
    [base] = set(client.batch("b").jobs) & set(client.batch("b-2").jobs)

    client.cancel("b")
    assert client.job(base).state is JobState.QUEUED

    client.cancel("b-2")
    assert client.job(base).state is JobState.CANCELLED


def test_one_job_is_cancelled_by_its_id(client: Client, tmp_path: Path) -> None:
    send(client, tmp_path)

    assert [job.id for job in client.cancel("b.1")] == ["b.1"]
    assert client.job("b.1.eval").reason is FailureReason.DEPENDENCY
    with pytest.raises(NotFoundError):
        client.cancel("b.77")


def test_a_name_that_was_misspelt_is_answered_with_the_right_one(client: Client, tmp_path: Path) -> None:
    send(client, tmp_path, name="medqa-rank")

    with pytest.raises(NotFoundError) as error:
        client.batch("medqa-rnak")
    assert error.value.do == "Did you mean medqa-rank?"
    with pytest.raises(NotFoundError) as error:
        client.job("medqa-rank")
    assert error.value.do == "It is a batch: `loraq ls medqa-rank` lists its jobs."
    with pytest.raises(NotFoundError) as error:
        client.batch("medqa-rank.1")
    assert error.value.do == "It is a job: `loraq show medqa-rank.1` shows it."
    with pytest.raises(NotFoundError) as error:
        client.job("medqa-rnak.1")
    assert error.value.do == "Did you mean medqa-rank.1?"
    with pytest.raises(NotFoundError) as error:
        client.job("medqa-rank/1")  # as a trial is named
    assert error.value.do == "Did you mean medqa-rank.1?"
    with pytest.raises(NotFoundError) as error:
        client.job("medqa-rank.7")
    assert error.value.do == "`loraq ls medqa-rank` lists the jobs that there are."


@pytest.mark.parametrize("act", [Client.cancel, Client.retry, Client.hold, Client.release])
def test_what_takes_a_batch_or_a_job_looks_for_both(
    act: Callable[[Client, str], object], client: Client, tmp_path: Path
) -> None:
    send(client, tmp_path, name="medqa-rank")

    with pytest.raises(NotFoundError) as error:
        act(client, "medqa-rnak")
    assert str(error.value) == "there is no batch or job 'medqa-rnak'\nDid you mean medqa-rank?"
    with pytest.raises(NotFoundError) as error:
        act(client, "medqa-rank.7")
    assert error.value.do == "`loraq ls medqa-rank` lists the jobs that there are."


def test_a_batch_to_ask_or_to_remove_that_was_misspelt_is_answered_with_the_right_one(
    client: Client, tmp_path: Path
) -> None:
    send(client, tmp_path, name="medqa-rank")

    for act in (lambda: client.ask("medqa-rnak/1", ["Hi"]), lambda: client.remove("medqa-rnak")):
        with pytest.raises(NotFoundError, match="Did you mean medqa-rank"):
            act()


def test_a_worker_that_was_misspelt_is_answered_with_the_right_one(client: Client) -> None:
    client.store.heartbeat("athene/gpu0", "gpu", {**WORKER, "host": "athene", "usable_bytes": GIB})

    for wrong, right in (("athen", "athene"), ("athene/gpu1", "athene/gpu0")):
        with pytest.raises(NotFoundError) as error:
            client.drain(wrong)
        assert error.value.do.startswith(f"Did you mean {right}")


# -- the sweeper's round


def test_a_hub_that_does_not_answer_holds_up_no_round(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, asked = threading.Event(), []

    def read_config(name: str, revision: str | None) -> None:
        asked.append(name)
        release.wait(20)

    monkeypatch.setattr("jobqueue.base_model.read_config", read_config)
    send(client, tmp_path, resources={})
    sweeper = Sweeper(client.store, make_app(client.store.url, 5), client.settings)

    for _ in range(3):
        sweeper.round()
    assert client.job("b.1").state is JobState.WAITING
    release.set()

    wait_for(lambda: client.job("b.1").state is JobState.QUEUED, 5, "the estimate is there")
    wait_for(lambda: client.store.sweep(60).unsized == [], 5, "and those of the other jobs")
    assert asked == ["owner/name-1B"], "one model is looked up once for all of its jobs"


def test_a_round_tops_up_lost_tokens_and_never_more_than_there_are_jobs(client: Client, tmp_path: Path) -> None:
    send(client, tmp_path)
    sweeper = Sweeper(client.store, make_app(client.store.url, 5), client.settings)
    with redis.Redis.from_url(client.store.url) as server:
        server.delete(queue_name("gpu8"))

    for _ in range(3):
        sweeper.round()

    assert client.store.tokens(queue_name("gpu8")) == 2


def test_a_round_estimates_what_the_submitter_could_not(client: Client, tmp_path: Path) -> None:
    send(client, tmp_path, resources={}, base_model="/elsewhere/name-1B")
    assert client.job("b.1").state is JobState.WAITING

    Sweeper(client.store, make_app(client.store.url, 5), client.settings).round()

    wait_for(lambda: client.job("b.1").state is not JobState.WAITING, 5, "the estimate is there")
    job = client.job("b.1")
    assert (job.state, job.queue) == (JobState.QUEUED, "gpu8")
    assert 1 * GIB < job.need_bytes < 8 * GIB


def test_what_was_measured_of_such_jobs_counts_at_submit_and_in_a_round(client: Client, tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "cli" / "demo" / "model"
    first = send(client, tmp_path, base_model=str(demo), resources={})
    known = client.job(f"{first.name}.1").need_bytes
    client.store.learn(f"train:qlora:{demo}", 1.5)
    client.store.learn("train:qlora:owner/name-1B", 2.0)

    again = send(client, tmp_path, base_model=str(demo), resources={})
    fixed = send(client, tmp_path, base_model=str(demo))
    remote = [send(client, tmp_path, base_model=f"owner/{name}", resources={}) for name in ("name-1B", "other-1B")]
    Sweeper(client.store, make_app(client.store.url, 5.0), client.settings).round()

    assert client.job(f"{again.name}.1").need_bytes == int(1.5 * known)
    assert client.job(f"{fixed.name}.1").need_bytes == 4 * GIB, "what the user says is not corrected"
    corrected, plain = (f"{batch.name}.1" for batch in remote)
    wait_for(lambda: client.job(corrected).need_bytes and client.job(plain).need_bytes, 60, "both are estimated")
    assert client.job(corrected).need_bytes == 2 * client.job(plain).need_bytes


def test_a_job_of_a_release_that_this_one_does_not_know_is_refused_and_the_others_go_on(client: Client) -> None:
    submit(client.store, new_job("x.1", spec={"kind": "train", "new": 1}, queue="", need=0), new_job("x.2"))

    Sweeper(client.store, make_app(client.store.url, 5), client.settings).round()

    wait_for(lambda: client.job("x.1").state.final, 5, "it is refused")
    job = client.job("x.1")
    assert (job.state, job.reason) == (JobState.FAILED, FailureReason.BAD_SPEC)
    assert client.store.tokens(queue_name("gpu8")) == 1


def test_a_round_takes_a_lost_job_back_and_ends_it_at_the_cap(client: Client) -> None:
    settings = replace(client.settings, lease_s=0.05, renew_s=0.01, sweep_s=0.01, max_failures=2)
    sweeper = Sweeper(client.store, make_app(client.store.url, 5), settings)
    submit(client.store, new_job("x.1"))

    for number in (1, 2):
        assert must_claim(client.store, lease_s=0.05).attempt == number

        def taken_back() -> bool:
            sweeper.round()
            return client.job("x.1").state is not JobState.RUNNING

        wait_for(taken_back, 5, "it is taken back")

    job = client.job("x.1")
    assert (job.state, job.reason, job.failures) == (JobState.FAILED, FailureReason.LOST, 2)
    assert job.message == "worker host/gpu0 was not heard of for 0.05 s"


def test_a_report_is_made_of_what_is_settled_while_the_batch_runs(client: Client, tmp_path: Path) -> None:
    send(client, tmp_path, evaluation=None)
    client.store.settle(must_claim(client.store), SUCCEEDED)

    report = client.report("b")

    assert [(trial.job, trial.state) for trial in report.trials] == [("b.1", JobState.SUCCEEDED)]


def answered(client: Client) -> None:
    """The batch b has ended; its base model and its trial have written answers to ten questions."""
    evaluate = {"kind": "evaluate", "base_model": "m", "load_in_4bit": True, "evaluation": {"metrics": ["generated"]}}
    report = {"kind": "report", "device": "control", "queue": "control", "need": 0}
    submit(
        client.store,
        new_job("b.1", spec={"kind": "train", "base_model": "m"}, trial="r=8"),
        new_job("b.1.eval", kind="evaluate", spec={**evaluate, "adapter_job": "b.1"}, needs=("b.1",)),
        new_job("base-1", kind="evaluate", spec={**evaluate, "adapter_job": None}, batch=""),
        new_job("b.report", spec={"kind": "report", "batch": "b"}, follows=("b.1", "b.1.eval", "base-1"), **report),
    )
    for _ in range(3):
        claimed = must_claim(client.store)
        folder = f"made/{claimed.job_id}"
        lines = [
            {"index": i, "question": f"Which {i}?", "reference": "this", "text": f"{claimed.job_id} says {i}"}
            for i in range(10)
        ]
        client.storage.write_text(f"{folder}/answers.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        client.store.settle(claimed, Settlement(JobState.SUCCEEDED, outcome={"folder": folder}))


def test_cards_go_out_to_people_and_their_scores_come_back_with_the_report(client: Client, tmp_path: Path) -> None:
    answered(client)
    deck = client.export_cards("b", questions=4, seed=1)
    assert {card.job for card in deck.cards} == {"b.1.eval", "base-1"}
    assert [model.label for model in deck.models] == ["r=8", "base model (4-bit)"]
    assert client.report("b").people is None

    files = []
    for reviewer in ("Ann", "Bob", "Cem"):
        scores = [f"{card.id},4,4,{5 if card.job == 'base-1' else 3},{reviewer}" for card in deck.cards]
        file = tmp_path / f"{reviewer}.csv"
        file.write_text("\n".join(["card,relevance,accuracy,fluency,reviewer", *scores]))
        files.append(file)
    made = client.import_cards("b", files)

    assert made.models[0].differences["fluency"].value == -2
    assert client.report("b").people == made
    with pytest.raises(DataError, match=r"cannot read .*none\.csv"):
        client.import_cards("b", [*files, tmp_path / "none.csv"])


def test_a_machine_without_the_storage_has_reports_but_no_cards(client: Client, settings: Settings) -> None:
    answered(client)
    afar = Client(replace(settings, storage=None))

    assert afar.report("b").people is None
    with pytest.raises(StorageError, match="does not know the workers' storage"):
        afar.export_cards("b", questions=4, seed=1)


def test_cards_wait_for_the_batchs_end(client: Client) -> None:
    submit(client.store, new_job("b.1", spec={"kind": "train", "base_model": "m"}))
    with pytest.raises(BusyError, match="b has not ended"):
        client.export_cards("b", questions=4, seed=1)
