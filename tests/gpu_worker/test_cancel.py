"""Cancel of jobs, trials and batches, whatever they do at that moment; by a real worker with the stub trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import wait_for
from worker_process import START_S, Site, succeeded_once

from gpu_worker.gpu import Device
from gpu_worker.trainer_process import worker_cache
from jobqueue.job import JobState
from jobqueue.service import Client

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}


@pytest.fixture(scope="module")
def here(one_site: Site) -> Site:
    return one_site


@pytest.fixture(scope="module")
def client(here: Site) -> Client:
    return Client(here.settings)


def sweep(client: Client, folder: Path, name: str, words: str, *, base: bool = True) -> None:
    """Two trials, each a training and an evaluation; the evaluation of the base model, if wanted; a report."""
    (folder / "rows.jsonl").write_text(json.dumps(ROW))
    content = {
        "name": name, "base_model": f"/stub/{words}", "data": {"source": "rows.jsonl"},
        "evaluation": {"source": "rows.jsonl", "compare_with_base": base}, "resources": {"memory": "1GiB"},
        "sweep": {"grid": {"lora.r": [8, 16]}},
    }  # fmt: skip
    (folder / "sweep.yaml").write_text(json.dumps(content))
    client.submit(client.plan(client.read(folder / "sweep.yaml")))


def states(client: Client, name: str) -> dict[str, str]:
    return {job.id.removeprefix(f"{name}."): job.state.value for job in client.jobs(name)}


def nothing_at_work(here: Site) -> bool:
    """No trainer is left but one that rests after a job that succeeded."""
    return len(here.left(trainers_only=True)) <= 2  # it and its guardian


# First, before any worker has been started.
def test_what_is_cancelled_while_every_worker_is_off_never_runs(here: Site, client: Client, tmp_path: Path) -> None:
    sweep(client, tmp_path, "off", "sleep:0.1")
    here.submit("offjob.1", "sleep:0.1")
    assert len(client.cancel("off")) == 6
    assert [job.id for job in client.cancel("offjob.1")] == ["offjob.1"]

    assert set(states(client, "off").values()) == {"cancelled"}
    here.start(LORAQ_STALL_S=60)
    here.submit("after.1", "sleep:0.1")
    assert succeeded_once(here.ended("after.1"))
    assert not [job.id for job in [*client.jobs("off"), client.job("offjob.1")] if job.attempt]


def test_a_cancelled_trial_takes_its_evaluation_along_and_leaves_the_other_trial_alone(
    here: Site, client: Client, tmp_path: Path
) -> None:
    sweep(client, tmp_path, "trial", "await:go")
    here.beating("trial.1")
    client.cancel("trial.1")
    here.ended("trial.1")
    (here.beats / "go").write_text("")  # the others end as well

    wait_for(lambda: client.batch("trial").ended, START_S, "the batch ends")

    assert states(client, "trial") == {
        "1": "cancelled", "1.eval": "cancelled", "2": "succeeded", "2.eval": "succeeded", "report": "succeeded",
        next(job.id for job in client.jobs("trial") if job.id.startswith("base-")): "succeeded",
    }  # fmt: skip
    assert here.store.jobs(["trial.1.eval"])[0].attempt == 0


def test_a_batch_is_cancelled_while_one_job_runs_with_a_deaf_trainer_and_others_wait(
    here: Site, client: Client, tmp_path: Path
) -> None:
    sweep(client, tmp_path, "all", "deaf/child/sleep:60")
    here.beating("all.1")
    asked = client.cancel("all")

    assert len(asked) == 6
    wait_for(lambda: client.batch("all").ended, START_S, "the batch ends")
    assert set(states(client, "all").values()) == {"cancelled"}
    assert here.left(trainers_only=True) == [], "when it is confirmed, nothing is left"
    assert len(here.trainers_in_turn("all.1")) == 1
    assert here.lines("all.2") == []


def test_an_evaluation_is_cancelled_in_the_middle(here: Site, client: Client, tmp_path: Path) -> None:
    sweep(client, tmp_path, "eval", "only:train/sleep:0.1/only:evaluate/deaf/child/sleep:60", base=False)
    here.beating("eval.1.eval")
    client.cancel("eval.1.eval")

    job = here.ended("eval.1.eval")

    assert (job.state, job.message) == (JobState.CANCELLED, "on request")
    assert client.job("eval.1").state is JobState.SUCCEEDED
    client.cancel("eval")
    wait_for(lambda: client.batch("eval").ended, START_S, "the batch ends")


def test_a_job_is_cancelled_while_it_writes_a_checkpoint_without_end(here: Site, client: Client) -> None:
    """A trainer that is deaf because it writes; what is half-written is gone with the attempt."""
    here.submit("saving.1", "deaf/sleep:0.2/saving/sleep:60", submission="s1")
    wait_for(lambda: (here.beats / "saving").exists(), START_S, "it writes")
    client.cancel("saving.1")

    job = here.ended("saving.1")

    assert (job.state, job.message) == (JobState.CANCELLED, "on request")
    assert nothing_at_work(here)
    assert here.storage.checkpoints("saving.1", "saving", "s1") == []
    scratch = worker_cache(here.settings.data_dir, Device("cpu", "cpu")) / "scratch"
    wait_for(lambda: not list(scratch.iterdir()), 5, "nothing half-written is left on the host")


def test_a_cancelled_job_that_is_retried_goes_on_from_its_newest_checkpoint(here: Site, client: Client) -> None:
    here.submit("stopped.1", "save/sleep:1/await:go on", submission="s1")
    wait_for(lambda: here.storage.checkpoints("stopped.1", "stopped", "s1"), START_S, "a checkpoint is kept")
    client.cancel("stopped.1")
    assert here.ended("stopped.1").state is JobState.CANCELLED

    (here.beats / "go on").write_text("")
    client.retry("stopped.1")

    assert here.ended("stopped.1").outcome["resumed"]
    wait_for(lambda: not here.storage.checkpoints("stopped.1", "stopped", "s1"), START_S, "then none is needed")


def test_a_job_that_waits_for_its_next_attempt_is_cancelled_at_once(here: Site, client: Client) -> None:
    here.submit("delayed.1", "sleep:0.1/exit:3")
    wait_for(lambda: here.store.job("delayed.1").failures == 1, START_S, "the first attempt fails")
    client.cancel("delayed.1")

    job = here.store.job("delayed.1")
    assert (job.state, job.attempt) == (JobState.CANCELLED, 1)
