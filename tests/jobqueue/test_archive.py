"""Batches that ended long ago leave the server, and are read in the storage: real server, real folder."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import AGAIN, SUCCEEDED, must_claim, new_job, snapshot, states, submit, wait_for

from jobqueue.archive import MOST, archive, archive_old
from jobqueue.broker import make_app
from jobqueue.errors import ArchivedError, NotFoundError, SpecError, StorageError
from jobqueue.export_spec import ExportOptions
from jobqueue.job import JobState, Settlement
from jobqueue.notification import Telling, Told
from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.spec import LoraSpec
from jobqueue.storage import Storage
from jobqueue.store import Store
from jobqueue.sweeper import Sweeper

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}
LORA = LoraSpec().model_dump(mode="json")
TRAIN = {"kind": "train", "base_model": "owner/name-1B", "method": "qlora", "data": {"source": "owner/rows"}}
EVALUATE = {"kind": "evaluate", "base_model": "m", "load_in_4bit": True, "evaluation": {"metrics": ["likelihood"]}}
DAYS_AGO = 31 * 24 * 3600 * 1000


@pytest.fixture
def client(settings: Settings) -> Client:
    return Client(settings)


@pytest.fixture
def storage(client: Client) -> Storage:
    return client.storage


@pytest.fixture
def afar(settings: Settings) -> Client:
    """On a machine that does not know the storage."""
    return Client(Settings(redis_url=settings.redis_url, data_dir=settings.data_dir))


FAILED = Settlement(JobState.FAILED, "nan_loss", "the loss is nan", counts=True)


def ended(store: Store, name: str = "b", *, evaluated: bool = True) -> None:
    """A batch of a training, its evaluation, a base model's, and a report, at its end."""
    report = {"kind": "report", "device": "control", "queue": "control", "need": 0}
    training = {**TRAIN, "lora": LORA, "training": {}, "resources": {}}
    submit(
        store,
        new_job(f"{name}.1", spec=training, trial="r=8"),
        new_job(f"{name}.1.eval", kind="evaluate", spec={**EVALUATE, "adapter_job": f"{name}.1"}, needs=(f"{name}.1",)),
        new_job("base-1", kind="evaluate", spec={**EVALUATE, "adapter_job": None}, batch=""),
        new_job(f"{name}.report", spec={"kind": "report", "batch": name}, follows=(f"{name}.1.eval",), **report),
    )
    store.settle(must_claim(store), AGAIN)  # so that there is a history
    while found := [job for job in store.jobs(store.batch(name).jobs) if job.state is JobState.QUEUED]:
        claimed = must_claim(store, device="control" if found[0].kind.control else "gpu")
        store.append(claimed, [("log", "I train"), ("progress", '{"step": 1}')], 0)
        outcome = {"folder": f"batches/{name}/{claimed.job_id}/1-ab", "likelihood": {"correct": 3, "accuracy": 0.75}}
        succeeded = Settlement(JobState.SUCCEEDED, outcome={} if found[0].kind.control else outcome)
        store.settle(claimed, succeeded if evaluated or claimed.job_id != f"{name}.1.eval" else FAILED)
    while due := store.to_tell(60):
        store.told(due, [Told("team", Telling.DELIVERED, 1, 1e9)], ["delivered"], None)


def age(store: Store, name: str = "b", by: int = DAYS_AGO) -> None:
    """As if all of it had happened so many ms earlier."""
    store._redis.zincrby("{loraq}:batches", -by, name)
    for job_id in store.batch(name).jobs:
        store._redis.hincrby(f"{{loraq}}:job:{job_id}", "ended_at", -by)


def archived(store: Store) -> list[str]:
    return [str(name) for name in store._redis.zrange("{loraq}:archived", 0, -1)]


def test_an_old_batch_leaves_the_server_and_is_read_in_the_storage_as_it_was(client: Client, storage: Storage) -> None:
    ended(client.store)
    age(client.store)
    batch, jobs, report = client.batch("b"), client.jobs("b"), client.report("b")
    assert report.trials[0].job == "b.1"

    assert archive_old(client.store, storage, 30) == 1

    left = [key.removeprefix("{loraq}:") for key in snapshot(client.store.url)]
    assert [key for key in left if key.startswith(("job:b.", "batch:", "batches"))] == []
    assert (client.batch("b"), client.jobs("b"), client.report("b")) == (batch, jobs, report)
    assert [client.job(job.id) for job in jobs] == jobs
    assert jobs[0].history, "there was something to lose"
    assert client.batches() == []
    assert client.events("b.1") == []


def test_a_base_model_stays_without_what_it_printed_and_may_be_asked_again(client: Client, storage: Storage) -> None:
    ended(client.store)
    assert client.events("base-1")

    assert archive(client.store, storage, "b")

    assert client.job("base-1").state is JobState.SUCCEEDED
    assert client.events("base-1") == []
    client.store._redis.hset("{loraq}:job:base-1", "state", "failed")
    submit(client.store, new_job("base-1", kind="evaluate", spec=EVALUATE, batch=""))
    must_claim(client.store)
    assert [event.kind for event in client.events("base-1")] == ["state"]


def test_a_base_model_that_was_at_work_since_for_another_batch_keeps_what_it_printed(
    client: Client, storage: Storage
) -> None:
    ended(client.store)
    client.store._redis.hincrby("{loraq}:job:base-1", "ended_at", 60_000)

    assert archive(client.store, storage, "b")
    assert client.events("base-1")


def test_what_is_young_or_goes_on_stays(client: Client, storage: Storage) -> None:
    ended(client.store, "young")
    age(client.store, "young", DAYS_AGO // 2)
    submit(client.store, new_job("held.1"), new_job("held.2"))
    must_claim(client.store)
    client.store._redis.zincrby("{loraq}:batches", -DAYS_AGO, "held")

    assert archive_old(client.store, storage, 30) == 0
    assert not archive(client.store, storage, "held")
    assert client.store.batch_names() == ["young", "held"]
    assert not Path(client.settings.storage_url).exists()


def test_a_retry_that_comes_in_between_wins(client: Client, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(client.store, evaluated=False)
    age(client.store)
    write = storage.write_text

    def slowly(relative: str, text: str) -> None:
        write(relative, text)
        if relative.endswith("archive.json"):
            client.store.retry(["b.1.eval"])
            client.store.settle(must_claim(client.store), FAILED)  # it has even ended again

    monkeypatch.setattr(storage, "write_text", slowly)

    assert not archive(client.store, storage, "b")
    assert client.store.job("b.1.eval").attempt == 2
    assert archived(client.store) == []

    monkeypatch.undo()
    client.store.retry(["b.1.eval"])
    assert not archive(client.store, storage, "b")
    assert states(client.store, "b.1.eval") == ["queued"]


@pytest.mark.parametrize("fault", ["unwritable", "loses what it is given", "not mounted"])
def test_nothing_leaves_the_server_while_the_storage_is_away(
    client: Client, storage: Storage, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended(client.store)
    age(client.store)
    before = snapshot(client.store.url)
    storage.pin()
    folder = Path(client.settings.storage_url)
    if fault == "unwritable":
        (folder / "batches").write_text("in the way")
    elif fault == "not mounted":
        (folder / "storage.json").unlink()
    else:
        monkeypatch.setattr(storage, "read_text", lambda relative: "")

    assert archive_old(client.store, storage, 30) == 0

    assert snapshot(client.store.url) == before
    assert "not archived, to be tried again" in caplog.text

    monkeypatch.undo()
    (folder / "batches").unlink() if fault == "unwritable" else (folder / "storage.json").touch()
    assert archive_old(client.store, storage, 30) == 1


def test_records_of_a_newer_release_stay_and_keep_no_other_back(
    client: Client, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    ended(client.store, "newer")
    client.store._redis.hset("{loraq}:job:newer.1", "kind", "distill")
    ended(client.store)
    age(client.store, "newer", 2 * DAYS_AGO)
    age(client.store)

    with caplog.at_level(logging.INFO):
        assert archive_old(client.store, storage, 30) == 1
    assert client.store.batch_names() == ["newer"]
    assert "newer: not archived" in caplog.text


def test_one_look_archives_a_few(client: Client, storage: Storage) -> None:
    for number in range(MOST + 1):
        submit(client.store, new_job(f"n{number}.1"))
        client.store.settle(must_claim(client.store), SUCCEEDED)
        age(client.store, f"n{number}")

    assert archive_old(client.store, storage, 30) == MOST
    assert archive_old(client.store, storage, 30) == 1


@pytest.mark.parametrize("before", ["the jobs are read", "they are written"])
def test_two_workers_at_once_do_no_harm(
    client: Client, storage: Storage, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(client.store)
    batch, jobs = client.batch("b"), client.jobs("b")
    slow = Store(client.store.url)
    target: object = slow if before == "the jobs are read" else storage
    step = "jobs" if target is slow else "write_text"
    do = getattr(target, step)

    def late(*args: Any) -> Any:
        monkeypatch.undo()
        assert archive(client.store, Storage(storage.url), "b")
        return do(*args)

    storage.pin()
    monkeypatch.setattr(target, step, late)
    with suppress(ArchivedError):
        assert archive(slow, storage, "b")

    assert archived(client.store) == ["b"]
    assert (client.batch("b"), client.jobs("b")) == (batch, jobs)
    assert archive_old(slow, storage, 0) == 0
    slow.close()


def test_a_batch_that_is_removed_in_between_leaves_nothing(
    client: Client, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(client.store)
    write = storage.write_text

    def late(relative: str, text: str) -> None:
        if relative.endswith("archive.json"):
            client.remove("b", files=True)
        write(relative, text)

    monkeypatch.setattr(storage, "write_text", late)
    with pytest.raises(NotFoundError):
        archive(client.store, storage, "b")
    assert not storage.exists("batches/b/archive.json")


def test_its_name_stays_taken_until_it_is_removed(client: Client, storage: Storage) -> None:
    ended(client.store)
    archive(client.store, storage, "b")
    assert submit(client.store, new_job("b.1")) is None

    client.remove("b", files=True)

    assert not storage.exists("batches/b")
    for look in (client.batch, client.jobs, client.report, client.remove):
        with pytest.raises(NotFoundError, match="there is no batch 'b'"):
            look("b")
    assert submit(client.store, new_job("b.1")) == ["gpu8"]


def test_a_machine_without_the_storage_is_told_what_it_lacks(client: Client, storage: Storage, afar: Client) -> None:
    ended(client.store)
    archive(client.store, storage, "b")

    for look in (afar.batch, afar.jobs, afar.report):
        with pytest.raises(ArchivedError, match="b ended long ago and was archived\nSet LORAQ_STORAGE, as the workers"):
            look("b")
    with pytest.raises(ArchivedError, match="Set LORAQ_STORAGE"):
        afar.job("b.1.eval")
    elsewhere = Client(Settings(redis_url=client.store.url, storage=storage.url + "-of-others"))
    with pytest.raises(StorageError, match=r"b was archived, and batches/b/archive\.json is not in the storage"):
        elsewhere.batch("b")
    storage.write_text("batches/b/archive.json", '{"batch": 1}')
    with pytest.raises(StorageError, match="cannot be read"):
        client.batch("b")


def test_what_cannot_be_done_with_it_is_one_clear_error(client: Client, storage: Storage) -> None:
    ended(client.store)
    archive(client.store, storage, "b")

    for do in (client.cancel, client.hold, client.release, client.retry):
        for target in ("b", "b.1"):
            with pytest.raises(ArchivedError, match="b ended long ago and was archived\nIt can be read"):
                do(target)
    with pytest.raises(ArchivedError, match="b ended long ago and was archived"):
        client.ask("b/1", ["?"])
    with pytest.raises(NotFoundError, match=r"there is no job 'b\.7'"):
        client.job("b.7")


def test_names_with_dots_are_told_apart(client: Client, storage: Storage) -> None:
    ended(client.store, "llama3")
    client.store.submit("llama3.1", "ann", 1, "m", [new_job("llama3.1.1", trial="r=9")], ["llama3.1.1"])
    client.store.settle(must_claim(client.store), SUCCEEDED)
    for name in ("llama3", "llama3.1"):
        assert archive(client.store, storage, name)

    assert [client.job(job_id).trial for job_id in ("llama3.1", "llama3.1.1")] == ["r=8", "r=9"]


def test_an_archived_trial_is_exported_and_trained_on(client: Client, afar: Client, tmp_path: Path) -> None:
    ended(client.store)
    archive(client.store, client.storage, "b")

    [job] = client.plan_export("b/1", ExportOptions(formats=("merged_16bit",))).jobs
    assert job.spec.model_dump()["adapter_job"] == "b.1"

    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    sweep = {"name": "c", "base_model": "owner/name-1B", "method": "qlora", "data": {"source": "rows.jsonl"}}
    (tmp_path / "sweep.yaml").write_text(
        json.dumps({**sweep, "from_adapter": "b/1", "resources": {"memory": "4GiB"}, "lora": LORA})
    )
    plan = client.plan(client.read(tmp_path / "sweep.yaml"))
    client.submit(plan)
    assert client.job("c.1").spec["from_adapter"] == "storage:batches/b/b.1/1-ab/adapter"
    with pytest.raises(SpecError, match=r"b ended long ago and was archived\. Set LORAQ_STORAGE"):
        afar.submit(plan, again=True)


def test_the_sweeper_looks_now_and_then_beside_its_rounds(client: Client, storage: Storage) -> None:
    app = make_app(client.store.url, 5)
    ended(client.store)
    age(client.store)
    for days, given in ((0.0, storage), (30.0, None)):
        settings = replace(client.settings, archive_days=days)
        idle = Sweeper(client.store, app, settings, given)
        idle.look_for_old()
        assert idle._archiving is None

    sweeper = Sweeper(client.store, app, client.settings, storage)
    sweeper.look_for_old()
    wait_for(lambda: archived(client.store) == ["b"], 10, "it is archived")
    looked = sweeper._archiving
    sweeper.look_for_old()
    assert sweeper._archiving is looked, "the next look is an hour away"


def test_a_server_at_its_memory_limit_is_emptied(client: Client, storage: Storage) -> None:
    ended(client.store)
    try:
        client.store._redis.config_set("maxmemory", 1)
        assert archive(client.store, storage, "b")
    finally:
        client.store._redis.config_set("maxmemory", 0)
    assert archived(client.store) == ["b"]
