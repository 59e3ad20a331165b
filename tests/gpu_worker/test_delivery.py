"""Jobs on their way to a trainer and back, where a queue whose messages are its jobs loses, doubles or forgets them."""

from __future__ import annotations

import contextlib
import signal

import redis
from helpers import wait_for
from worker_process import START_S, Site, succeeded_once

from jobqueue.broker import make_app, queue_name, send_tokens
from jobqueue.job import FailureReason, JobState

BY_TOKEN = {"device": "cpu", "queue": "cpu"}  # a class that a CPU worker listens to
TOKENS_ONLY = {"LORAQ_POLL_S": 600}  # an idle slot does not ask by itself


def wake(here: Site, times: int = 1) -> None:
    send_tokens(make_app(here.store.url, 5), ["cpu"] * times)


def idle(here: Site, workers: int) -> None:
    """As many workers listen, each with its control process."""
    wait_for(lambda: here.listening() == 2 * workers, START_S, "they listen")


def test_a_job_runs_once_however_long_it_takes_and_however_often_its_message_comes(
    here: Site, admin: redis.Redis
) -> None:
    """celery#5935, kombu#337: with the message as the job, unacknowledged till its end, the visibility timeout gives it
    to a second worker in mid-job. Here nothing lies there to be given again, and a message more does nothing."""
    here.start(**TOKENS_ONLY)
    here.start(**TOKENS_ONLY, LORAQ_DATA_DIR=here.folder / "data2")
    idle(here, 2)
    here.submit("b.1", "sleep:3", **BY_TOKEN)
    wake(here)
    here.beating("b.1")
    assert admin.hlen("unacked") == admin.zcard("unacked_index") == 0
    wake(here, 5)

    job = here.ended("b.1")
    assert succeeded_once(job)
    assert len(here.trainers_in_turn("b.1")) == 1
    wait_for(lambda: admin.llen(queue_name("cpu")) == 0, START_S, "every message is taken")
    assert here.store.job("b.1").attempt == 1


def test_a_message_that_a_stopped_and_then_killed_worker_was_handed_costs_no_job(
    here: Site, admin: redis.Redis
) -> None:
    """celery#7950: such a job was lost."""
    worker = here.start(**TOKENS_ONLY)
    idle(here, 1)
    celery, app = worker.celery(), make_app(here.store.url, 5)

    def handed() -> bool:
        """Redis gives it to a stopped worker if its question, which holds for a second, is not over by then."""
        celery.suspend()
        send_tokens(app, ["cpu"])
        with contextlib.suppress(AssertionError):
            return wait_for(lambda: not admin.llen(queue_name("cpu")), 0.5, "it is in the stopped worker's hands")
        admin.delete(queue_name("cpu"))
        celery.resume()
        idle(here, 1)
        return False

    wait_for(handed, START_S, "the message is in the stopped worker's hands")
    here.submit("b.1", "sleep:0.1", **BY_TOKEN)
    celery.send_signal(signal.SIGKILL)

    job = here.ended("b.1")
    assert succeeded_once(job)
    assert job.attempt == 1


def test_a_job_that_kills_its_worker_ends_at_its_cap_with_its_last_words_and_the_next_one_is_done(here: Site) -> None:
    """celery#9082: it was redelivered without end."""
    here.start(LORAQ_LEASE_S=1.5, LORAQ_MAX_FAILURES=2)
    here.submit("b.1", "sleep:1.2/kill-worker")
    here.submit("c.1", "sleep:0.1")

    job = here.ended("b.1", 2 * START_S)

    assert (job.state, job.reason, job.failures) == (JobState.FAILED, FailureReason.LOST, 2)
    assert len(set(here.trainers_in_turn("b.1"))) == 2
    assert job.message.endswith("was not heard of for 1.5 s; its last words: stub: b.1")
    assert succeeded_once(here.ended("c.1"))


def test_after_a_reconnect_a_short_job_does_not_wait_behind_a_long_one_while_another_worker_idles(
    here: Site, admin: redis.Redis
) -> None:
    """celery#3765"""
    here.start()
    here.start(LORAQ_DATA_DIR=here.folder / "data2")
    idle(here, 2)
    admin.execute_command("CLIENT", "KILL", "TYPE", "normal")
    idle(here, 2)
    here.submit("long.1", "sleep:8", **BY_TOKEN)
    here.submit("short.1", "sleep:0.1", **BY_TOKEN)

    assert succeeded_once(here.ended("short.1"))
    assert here.store.job("long.1").state is JobState.RUNNING


def test_a_trainer_in_native_code_that_lets_no_thread_run_for_three_leases_is_not_taken_for_dead(here: Site) -> None:
    """dramatiq#692"""
    here.start(LORAQ_LEASE_S=2)
    here.submit("b.1", "gil:6")

    job = here.ended("b.1")

    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (1, 0)


def test_nothing_of_the_truth_is_in_celerys_keys_and_they_do_not_grow(here: Site, admin: redis.Redis) -> None:
    """flower#476, #1305: what a monitor had gathered from events was lost, and its memory grew."""
    here.start()
    for number in range(1, 9):
        here.submit(f"b{number}.1", "sleep:0.1", **BY_TOKEN)
    wake(here, 8)

    def others() -> list[str]:
        return [key for key in admin.scan_iter("*") if not key.startswith("{loraq}:")]

    while not all(here.store.job(f"b{number}.1").state.final for number in range(1, 9)):
        if found := others():
            admin.delete(*found)
    jobs = [here.store.job(f"b{number}.1") for number in range(1, 9)]

    assert all(succeeded_once(job) and job.attempt == 1 for job in jobs)
    assert all(here.store.events(job.id, "0", 0) for job in jobs)
    wait_for(lambda: len(others()) <= 4, START_S, "nothing is left of tokens but the queues' names")
