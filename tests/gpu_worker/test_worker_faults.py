"""A real worker of the CPU whose processes, or whose server, are killed, stopped and started again in mid-job."""

from __future__ import annotations

import contextlib
import signal
import time

import psutil
import pytest
import redis
from helpers import RestartableServer, new_job, submit, wait_for
from worker_process import LEASE_S, START_S, Site, gone, succeeded_once

from jobqueue.job import FailureReason, JobState


def test_a_celery_process_that_is_killed_is_started_again_and_its_job_is_run_once_more(here: Site) -> None:
    worker = here.start()
    here.submit("b.1", "deaf/child/sleep:2")
    here.beating("b.1")
    before = here.left(trainers_only=True)
    worker.celery().kill()

    assert len(before) == 3, "guardian, trainer, child"
    wait_for(lambda: gone(before), LEASE_S / 2, "they die before the lease ends")
    assert here.store.job("b.1").state is JobState.RUNNING

    job = here.ended("b.1")
    assert succeeded_once(job)
    assert (job.attempt, job.failures, job.history[0]["reason"]) == (2, 1, FailureReason.LOST)
    assert len(here.trainers_in_turn("b.1")) == 2
    assert worker.supervisor.is_running()
    assert worker.stop() == 0
    assert here.left() == []


def test_when_the_supervisor_is_killed_everything_dies_and_the_next_one_runs_the_job_again(here: Site) -> None:
    worker = here.start()
    here.submit("b.1", "sleep:2")
    here.beating("b.1")
    worker.kill()

    wait_for(lambda: not here.left(), LEASE_S, "nothing of the worker is left")
    here.start()

    job = here.ended("b.1")
    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (2, 1)
    assert len(here.trainers_in_turn("b.1")) == 2


def test_a_second_worker_of_a_device_does_no_harm_and_takes_over_when_the_first_has_gone(here: Site) -> None:
    first = here.start()
    here.submit("b.1", "await:go")
    here.beating("b.1")
    second = here.start("--cpu", "--no-control")
    wait_for(lambda: "another worker serves cpu" in second.log.read_text(), START_S, "the second one is refused")
    assert "LORAQ_DATA_DIR" in second.log.read_text(), "it says what to do"

    (here.beats / "go").write_text("")
    job = here.ended("b.1")
    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (1, 0)

    first.kill()
    here.submit("c.1", "sleep:0.1")
    assert succeeded_once(here.ended("c.1"))


def test_a_job_of_a_kind_that_a_newer_release_knows_ends_and_the_worker_goes_on(here: Site, admin: redis.Redis) -> None:
    submit(here.store, new_job("b.1", kind="distill", spec={"kind": "distill"}))
    here.start()

    wait_for(lambda: admin.hget("{loraq}:job:b.1", "state") == "failed", START_S, "it ends")
    assert admin.hget("{loraq}:job:b.1", "message").endswith("knows no jobs of the kind 'distill'")
    here.submit("c.1", "sleep:0.1")
    assert succeeded_once(here.ended("c.1", LEASE_S))


def test_a_job_whose_guardian_hangs_is_cancelled_all_the_same(here: Site) -> None:
    worker = here.start()
    here.submit("b.1", "sleep:60")
    here.beating("b.1")
    worker.guardian().suspend()
    here.store.cancel(["b.1"])

    job = here.ended("b.1")
    assert (job.state, job.message) == (JobState.CANCELLED, "on request")
    assert here.left(trainers_only=True) == []
    assert worker.stop() == 0


@pytest.mark.parametrize("woken_by", ["token", "poll"])
def test_sigterm_gives_the_job_back_without_a_failure_and_another_worker_finishes_it(here: Site, woken_by: str) -> None:
    """skypilot#7117: a preemption went unnoticed. wandb#4237: a preempted trial did not start again."""
    only = {"LORAQ_POLL_S": 60} if woken_by == "token" else {"LORAQ_SWEEP_S": 60, "LORAQ_LEASE_S": 180}
    worker = here.start(**only, LORAQ_GRACE_S=1)  # which it takes, being deaf
    wait_for(lambda: here.listening() == 2, START_S, "it listens")
    here.submit("b.1", "deaf/sleep:2", device="cpu", queue="cpu")
    here.beating("b.1")
    assert worker.stop() == 0

    job = here.store.job("b.1")
    assert here.left() == []
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)
    assert here.store.workers() == [], "it has said goodbye"

    here.start()
    job = here.ended("b.1")
    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (2, 0)
    assert len(here.trainers_in_turn("b.1")) == 2


def test_a_job_outlives_a_server_that_is_killed_and_started_again(here: Site, server: RestartableServer) -> None:
    """celery#7185: a running job was marked as ended when the broker went away."""
    here.start()
    here.submit("b.1", "sleep:2")
    here.beating("b.1")
    server.restart()

    job = here.ended("b.1")

    assert succeeded_once(job)
    assert (job.attempt, job.failures, len(job.history)) == (1, 0, 1)
    assert len(here.trainers_in_turn("b.1")) == 1
    here.submit("b2.1", "sleep:0.1")
    assert succeeded_once(here.ended("b2.1")), "the worker still takes jobs"


def test_a_worker_that_is_cut_off_ends_its_trainer_before_the_lease_and_takes_jobs_again(
    here: Site, server: RestartableServer
) -> None:
    here.start()
    here.submit("b.1", "deaf/sleep:30", submission="s1")
    trainer = psutil.Process(here.beating("b.1"))
    server.tell(signal.SIGSTOP)
    began = time.monotonic()

    wait_for(lambda: gone([trainer]), LEASE_S, "the trainer is dead")
    assert time.monotonic() - began < LEASE_S
    server.tell(signal.SIGCONT)

    wait_for(lambda: here.store.job("b.1").attempt == 2, START_S, "the job is run again")
    here.beating("b.1")
    here.store.cancel(["b.1"])
    job = here.ended("b.1")
    assert (job.state, job.failures) == (JobState.CANCELLED, 0), "neither the trainer nor its job was to blame"
    assert job.history[0]["reason"] == FailureReason.CUT_OFF
    assert len(here.trainers_in_turn("b.1")) == 2
    said = [event.text for event in here.store.events("b.1", "0", 0)]
    assert any("going on from step" in text for text in said), "the guardian had asked for a checkpoint"


def test_jobs_that_were_cancelled_while_no_worker_was_there_are_not_run(here: Site) -> None:
    """celery#8888: the cancel was forgotten."""
    here.submit("b.1", "sleep:0.1")
    here.submit("c.1", "sleep:0.1")
    here.store.cancel(["b.1"])
    here.start()

    assert succeeded_once(here.ended("c.1"))
    assert here.store.job("b.1").state is JobState.CANCELLED
    assert here.lines("b.1") == []


def test_a_host_that_cannot_write_takes_no_job_and_does_not_spoil_the_queue(here: Site) -> None:
    (here.folder / "file").write_text("no folder")
    for number in range(1, 6):
        here.submit(f"b{number}.1", "sleep:0.1")
    sick = here.start(LORAQ_STORAGE=here.folder / "file" / "storage")
    wait_for(
        lambda: any(w.note.startswith("sick: cannot write in the storage") for w in here.store.workers()),
        START_S,
        "the worker notices, and says so",
    )

    assert not [job.id for job in here.store.jobs([f"b{number}.1" for number in range(1, 6)]) if job.attempt]

    assert sick.stop() == 0
    here.start()
    assert all(succeeded_once(here.ended(f"b{number}.1")) for number in range(1, 6))


@pytest.mark.parametrize("options", [("--cpu", "--no-control"), ("--control-only",)])
def test_a_worker_that_is_told_to_end_as_soon_as_it_is_listed_says_goodbye(
    here: Site, options: tuple[str, ...]
) -> None:
    """Celery listens to signals only some time after the first heartbeat; it was ended there, and stayed listed."""
    for _ in range(2):
        worker = here.start(*options)
        wait_for(here.store.workers, START_S, "it is listed")
        assert worker.stop() == 0
        assert here.store.workers() == []


def test_a_stop_as_systemd_does_it_leaves_nothing_also_where_the_time_is_too_short(here: Site) -> None:
    """SIGTERM to the main process, then SIGKILL to whatever is left of the unit."""
    worker = here.start(LORAQ_GRACE_S=30)
    here.submit("b.1", "save/deaf/child/sleep:3", submission="s1")
    wait_for(lambda: here.storage.checkpoints("b.1", "b", "s1"), START_S, "there is a checkpoint")
    worker.supervisor.terminate()
    before = here.left()
    for process in before:
        with contextlib.suppress(psutil.NoSuchProcess):  # SIGTERM was quicker
            process.kill()

    wait_for(lambda: gone(before), 5, "all of them are gone")
    assert here.left() == []
    here.start()
    job = here.ended("b.1")
    assert succeeded_once(job)
    assert (job.attempt, job.history[0]["reason"]) == (2, FailureReason.LOST)
    assert job.outcome["resumed"], "it goes on from the checkpoint"
    assert len(here.trainers_in_turn("b.1")) == 2
