"""Hold and release, retry, drain and undrain, limits of time: through the client, on a real worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import wait_for
from worker_process import START_S, Site, succeeded_once

from jobqueue.errors import NotFoundError
from jobqueue.job import Batch, FailureReason, JobState
from jobqueue.service import Client


@pytest.fixture(scope="module")
def here(one_site: Site) -> Site:
    return one_site


@pytest.fixture(scope="module", autouse=True)
def worker(here: Site) -> None:
    here.start(LORAQ_STALL_S=4)


@pytest.fixture
def client(here: Site) -> Client:
    return Client(here.settings)


def sweep(client: Client, folder: Path, name: str, words: str) -> Batch:
    """Two trainings with their evaluations, one of the base model, a report."""
    row = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    file = folder / f"{name}.yaml"
    content = {
        "name": name, "base_model": f"/stub/{words}", "data": {"source": "rows.jsonl"},
        "evaluation": {"source": "rows.jsonl"}, "resources": {"memory": "1GiB"},
        "sweep": {"grid": {"lora.r": [8, 16]}},
    }  # fmt: skip
    file.write_text(json.dumps(content))
    return client.submit(client.plan(client.read(file)))


def states(client: Client, name: str) -> dict[str, str]:
    return {job.id.removeprefix(f"{name}."): job.state.value for job in client.jobs(name)}


def claim_nonce(here: Site, job_id: str) -> str:
    return str(here.store._redis.hget(f"{{loraq}}:job:{job_id}", "nonce"))


def ended(client: Client, name: str) -> dict[str, str]:
    wait_for(lambda: client.batch(name).ended, START_S, f"{name} ends")
    return states(client, name)


def test_a_held_class_starts_nothing_and_goes_on_when_it_is_released(here: Site, client: Client) -> None:
    client.hold("gpu8")
    here.submit("class.1", "sleep:0.1")
    here.submit("other.1", "sleep:0.1", queue="cpu", device="cpu")

    assert succeeded_once(here.ended("other.1"))
    assert client.job("class.1").state is JobState.QUEUED

    client.release("gpu8")
    assert succeeded_once(here.ended("class.1"))


def test_a_held_batch_finishes_what_runs_and_starts_nothing_else_until_it_is_released(
    here: Site, client: Client, tmp_path: Path
) -> None:
    sweep(client, tmp_path, "held", "await:held")
    here.beating("held.1")
    client.hold("held")
    (here.beats / "held").write_text("")
    wait_for(lambda: client.job("held.1").state is JobState.SUCCEEDED, START_S, "what runs goes on")

    wait_for(lambda: not client.workers()[0].running, START_S, "the worker is idle")
    now = states(client, "held")
    assert (now["1.eval"], now["2"], now["2.eval"], now["report"]) == ("held", "held", "waiting", "waiting")

    client.release("held")
    assert set(ended(client, "held").values()) == {"succeeded"}


def test_retry_runs_what_failed_with_what_waited_for_it_and_makes_the_report_anew(
    here: Site, client: Client, tmp_path: Path
) -> None:
    broken = here.folder / "broken"
    sweep(client, tmp_path, "again", f"unless:{broken.name}")
    before = ended(client, "again")
    assert (before["1"], before["1.eval"], before["report"]) == ("failed", "cancelled", "succeeded")

    (here.beats / broken.name).write_text("mended")
    begun = client.retry("again.1")

    assert [job.id for job in begun] == ["again.1", "again.1.eval", "again.report"]
    wait_for(lambda: client.job("again.1.eval").state.final, START_S, "it ends")
    after = ended(client, "again")
    assert (after["1"], after["1.eval"], after["2"], after["report"]) == (
        "succeeded",
        "succeeded",
        "failed",
        "succeeded",
    )
    assert client.job("again.report").attempt == 2

    client.retry("again")
    assert set(ended(client, "again").values()) == {"succeeded"}
    assert client.retry("again") == []


def test_a_drained_worker_gives_its_job_back_takes_nothing_and_says_so(here: Site, client: Client) -> None:
    here.submit("drain.1", "sleep:5", submission="s")
    here.beating("drain.1")
    host = client.workers()[0].host
    assert {worker.id for worker in client.drain(host)} == {f"{host}/cpu", f"{host}/control"}

    wait_for(lambda: client.job("drain.1").state is JobState.QUEUED, START_S, "the job goes back")
    wait_for(lambda: {w.note for w in client.workers()} == {"drained"}, START_S, "the workers say so")
    assert client.job("drain.1").failures == 0

    client.drain(host, undo=True)
    job = here.ended("drain.1")
    assert succeeded_once(job)
    assert job.outcome["resumed"], "it went on from the checkpoint that the drain had asked for"


def test_a_name_that_no_worker_has_cannot_be_drained(client: Client) -> None:
    with pytest.raises(NotFoundError, match="no worker or host 'nobody'"):
        client.drain("nobody")


def test_a_job_that_takes_longer_than_it_may_fails_for_good(here: Site, client: Client) -> None:
    here.submit("slow.1", "sleep:60", timeout_minutes=0.02)

    job = here.ended("slow.1")

    assert (job.state, job.reason, job.attempt) == (JobState.FAILED, FailureReason.TIMED_OUT, 1)
    assert "timeout_minutes (0.02)" in job.message


def test_a_trainer_that_gives_no_sign_of_life_is_ended_and_the_job_tried_again(here: Site, client: Client) -> None:
    here.submit("mute.1", "mute:60")

    wait_for(lambda: client.job("mute.1").failures == 1, START_S, "the first attempt is given up")

    job = client.job("mute.1")
    assert job.history[0]["reason"] == "crashed"
    assert "no sign of life for 4 s" in job.history[0]["message"]
    client.cancel("mute.1")
    assert here.ended("mute.1").state is JobState.CANCELLED


def test_a_job_that_runs_out_of_memory_goes_on_with_smaller_micro_batches_at_no_cost(here: Site) -> None:
    here.submit("oom.1", "oom:1/sleep:0.1")  # 2 x 4 by default

    job = here.ended("oom.1")

    assert succeeded_once(job)
    assert job.outcome["split"] == [1, 8]
    assert (job.attempt, job.failures) == (2, 0)


def test_a_job_for_which_no_micro_batch_is_small_enough_fails_and_says_so_also_when_it_is_retried(
    here: Site, client: Client
) -> None:
    here.submit("oom2.1", "oom:0")
    first = here.ended("oom2.1")
    client.retry("oom2.1")
    second = here.ended("oom2.1")

    for job, attempts in ((first, 2), (second, 4)):
        assert (job.state, job.reason, job.attempt) == (JobState.FAILED, FailureReason.OUT_OF_MEMORY, attempts)
        assert "nothing smaller is left" in job.message
    log = here.storage.read_text(f"batches/oom2/oom2.1/4-{claim_nonce(here, 'oom2.1')}/log.txt")
    assert log == "stub: oom2.1\n", "the log of an attempt that failed is kept"
