"""No work is thrown away that a checkpoint could have saved: lost and drained jobs go on where they were."""

from __future__ import annotations

from pathlib import Path

import psutil
from helpers import wait_for
from worker_process import START_S, Site, succeeded_once

from jobqueue.job import Job, JobState
from jobqueue.storage import Published

STEPS = 80  # of `sleep:4`


def kept(here: Site, job: Job) -> list[Published]:
    return here.storage.checkpoints(job.id, job.batch, "s1")


def begin(here: Site, words: str) -> Job:
    here.submit("b.1", words, submission="s1")
    return here.store.job("b.1")


def resumed_step(job: Job) -> int:
    return int(Path(job.outcome["resumed"]).name.removeprefix("checkpoint-"))


def test_a_job_whose_trainer_was_killed_goes_on_from_its_newest_checkpoint(here: Site) -> None:
    here.start()
    job = begin(here, "save/sleep:4")
    wait_for(lambda: len(kept(here, job)) == 2, START_S, "two checkpoints are in the storage")
    psutil.Process(here.beating("b.1")).kill()

    job = here.ended("b.1")

    assert succeeded_once(job)
    step = resumed_step(job)
    assert step >= 20
    assert len(here.lines("b.1")) < STEPS + 20, "only the steps since the checkpoint were done twice"
    wait_for(lambda: kept(here, job) == [], 5, "a succeeded job keeps no checkpoint")


def test_only_so_many_checkpoints_are_kept_and_the_newest_is_one_of_them(here: Site) -> None:
    here.start()
    job = begin(here, "save/sleep:4")
    wait_for(lambda: here.store.job("b.1").progress.get("step", 0) >= 55, START_S, "five checkpoints were written")

    found = wait_for(lambda: [p.manifest["step"] for p in kept(here, job)], 5, "there are checkpoints")

    assert len(found) <= 3, "two, and for a moment the one that is to go"
    assert found[0] >= 40


def test_a_drained_worker_saves_first_and_the_next_worker_on_another_host_goes_on(here: Site) -> None:
    worker = here.start(LORAQ_GRACE_S=5)
    job = begin(here, "sleep:4")
    here.beating("b.1")

    assert worker.stop() == 0
    job = here.store.job("b.1")
    saved = [p.manifest["step"] for p in kept(here, job)]
    here.start(LORAQ_DATA_DIR=here.folder / "another-host")
    job = here.ended("b.1")

    assert len(saved) == 1, "SIGUSR1 asked for one though no step was due"
    assert (job.failures, job.attempt) == (0, 2)
    assert resumed_step(job) == saved[0]
    assert len(here.lines("b.1")) <= STEPS + 5


def test_a_checkpoint_without_its_manifest_or_of_another_submit_is_not_gone_on_from(here: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "step.txt").write_text("70")
    for attempt, submission in ((8, "other"), (9, "s1")):
        folder = f"batches/b/b.1/{attempt}-ff/checkpoints/checkpoint-70"
        here.storage.publish(made, folder, {"submission": submission, "step": 70})
    here.storage._fs.rm_file(here.storage.address("batches/b/b.1/9-ff/checkpoints/checkpoint-70/manifest.json"))
    here.start()
    begin(here, "sleep:0.2")

    job = here.ended("b.1")

    assert job.state is JobState.SUCCEEDED
    assert job.outcome["resumed"] is None
