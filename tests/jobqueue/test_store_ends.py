"""How jobs end in the store: dependencies, cancelling, delays, expired leases, jobs whose size is not known."""

from __future__ import annotations

import pytest
from helpers import AGAIN, SUCCEEDED, claim, must_claim, new_job, states, submit, wait_for

from jobqueue.errors import StaleAttemptError
from jobqueue.job import FailureReason, JobState
from jobqueue.memory import GIB
from jobqueue.store import Settlement, Store

FAILED = Settlement(JobState.FAILED, "nan_loss", "the loss is nan", counts=True)
IDS = ("b.1", "b.1.eval", "b.report")


@pytest.fixture
def batch(store: Store) -> Store:
    """A train job, the evaluation that needs it, the report that follows both."""
    report = new_job("b.report", kind="report", device="control", queue="control", need=0, follows=("b.1", "b.1.eval"))
    submit(store, new_job("b.1"), new_job("b.1.eval", kind="evaluate", needs=("b.1",)), report)
    return store


# -- dependencies


def test_each_job_is_queued_when_what_it_waits_for_is_done(batch: Store) -> None:
    assert batch.settle(must_claim(batch), SUCCEEDED) == ["gpu8"]
    assert states(batch, *IDS) == ["succeeded", "queued", "waiting"]

    assert batch.settle(must_claim(batch), SUCCEEDED) == ["control"]
    assert states(batch, *IDS) == ["succeeded", "succeeded", "queued"]

    batch.settle(must_claim(batch, "host/control", "control"), SUCCEEDED)
    assert batch.batch("b").ended
    assert batch.batch("b").state is JobState.SUCCEEDED


def test_the_evaluation_of_a_train_job_that_failed_is_cancelled_and_the_report_still_runs(batch: Store) -> None:
    assert batch.settle(must_claim(batch), FAILED) == ["control"]

    train, evaluation, report = batch.jobs(IDS)
    assert (train.state, train.reason, train.message) == (JobState.FAILED, FailureReason.NAN_LOSS, "the loss is nan")
    assert (evaluation.state, evaluation.reason) == (JobState.CANCELLED, FailureReason.DEPENDENCY)
    assert evaluation.message == "b.1 failed"
    assert report.state is JobState.QUEUED
    assert must_claim(batch, "host/control", "control").job_id == "b.report"


def test_a_job_that_is_tried_again_keeps_the_others_waiting(batch: Store) -> None:
    batch.settle(must_claim(batch), AGAIN)

    assert states(batch, *IDS) == ["queued", "waiting", "waiting"]


def test_a_job_submitted_after_its_need_had_failed_is_not_left_waiting(store: Store) -> None:
    submit(store, new_job("a.1"))
    store.settle(must_claim(store), FAILED)

    submit(store, new_job("b.1.eval", kind="evaluate", needs=("a.1",)))

    assert states(store, "b.1.eval") != ["waiting"]


# -- cancelling


def test_a_queued_job_is_cancelled_at_once_and_never_claimed(batch: Store) -> None:
    assert batch.cancel(["b.1"]) == (["b.1"], ["control"])

    train, evaluation, report = batch.jobs(IDS)
    assert (train.state, train.message) == (JobState.CANCELLED, "on request")
    assert (evaluation.state, evaluation.reason) == (JobState.CANCELLED, FailureReason.DEPENDENCY)
    assert report.state is JobState.QUEUED
    assert claim(batch) is None


def test_a_waiting_job_is_cancelled_at_once_and_not_queued_by_what_it_waited_for(batch: Store) -> None:
    batch.cancel(["b.1.eval"])
    batch.settle(must_claim(batch), SUCCEEDED)

    assert states(batch, *IDS) == ["succeeded", "cancelled", "queued"]


def test_a_running_job_is_asked_to_stop_and_its_next_renewal_says_so(batch: Store) -> None:
    attempt = must_claim(batch)
    assert batch.renew(attempt) is False

    assert batch.cancel(["b.1"]) == (["b.1"], [])
    assert batch.job("b.1").cancel_requested
    assert states(batch, "b.1") == ["running"]
    assert batch.renew(attempt) is True

    batch.settle(attempt, Settlement(JobState.CANCELLED, message="on request"))
    assert states(batch, *IDS) == ["cancelled", "cancelled", "queued"]


def test_a_cancelled_job_is_not_tried_again_whatever_ended_its_attempt(batch: Store) -> None:
    attempt = must_claim(batch)
    batch.cancel(["b.1"])
    batch.settle(attempt, AGAIN)

    job = batch.job("b.1")
    assert (job.state, job.reason, job.message) == (JobState.CANCELLED, None, "on request")
    assert claim(batch) is None


def test_a_delayed_job_can_be_cancelled(batch: Store) -> None:
    batch.settle(must_claim(batch), Settlement(JobState.QUEUED, "crashed", "", delay_s=0.01))
    batch.cancel(["b.1"])

    wait_for(lambda: not batch._redis.zcard("{loraq}:delayed"), 5, "nothing is delayed")
    batch.sweep(30)
    assert claim(batch) is None
    assert states(batch, "b.1") == ["cancelled"]


@pytest.mark.parametrize("end", [SUCCEEDED, FAILED])
def test_an_ended_job_is_left_alone(batch: Store, end: Settlement) -> None:
    batch.settle(must_claim(batch), end)
    before = batch.job("b.1")

    assert batch.cancel(["b.1", "nowhere.1"]) == ([], [])
    assert batch.job("b.1") == before


def test_a_job_that_has_succeeded_since_somebody_saw_it_fail_is_not_run_again(batch: Store) -> None:
    batch.settle(must_claim(batch), FAILED)
    batch.retry(["b.1"])
    batch.settle(must_claim(batch), SUCCEEDED)

    assert batch.retry(["b.1"]) == ([], [])
    assert states(batch, "b.1") == ["succeeded"]
    assert batch.job("b.1").outcome == {"ok": True}


# -- delays and leases


def test_a_delayed_job_comes_back_through_a_sweep_and_not_before_its_time(store: Store) -> None:
    """celery#5935: with a countdown above the visibility timeout a task ran several times."""
    submit(store, new_job("b.1"))
    woken = store.settle(must_claim(store), Settlement(JobState.QUEUED, "crashed", "x", delay_s=0.4, counts=True))
    not_before = store.job("b.1").not_before

    assert woken == []
    assert store.sweep(30).queues["gpu8"] == 0
    assert claim(store) is None

    wait_for(lambda: store.sweep(30).queues["gpu8"] == 1, 5, "a sweep brings the job back")
    seconds, micros = store._redis.time()
    assert seconds + micros / 1e6 >= not_before
    assert must_claim(store).attempt == 2


def test_an_expired_lease_is_found_by_a_sweep_and_only_then(store: Store) -> None:
    submit(store, new_job("b.1"))
    attempt = must_claim(store, lease_s=0.5)
    expected = [("b.1", attempt.attempt, attempt.nonce)]
    lost = Settlement(JobState.QUEUED, FailureReason.LOST, "silent", counts=True)

    assert store.sweep(0.05).expired == []
    with pytest.raises(StaleAttemptError):
        store.settle(attempt, lost, only_expired=True)
    wait_for(lambda: store.sweep(0.05).expired == expected, 5, "the sweep finds the lease")
    assert states(store, "b.1") == ["running"], "only the sweeper's settlement takes it away"
    store.settle(attempt, lost, only_expired=True)
    assert must_claim(store).attempt == 2


def test_a_renewed_lease_does_not_expire(store: Store) -> None:
    submit(store, new_job("b.1"))
    attempt = must_claim(store, lease_s=0.3)
    wait_for(lambda: store.sweep(0.05).expired, 5, "the lease has ended")

    store.renew(attempt)

    assert store.sweep(0.05).expired == []
    with pytest.raises(StaleAttemptError):
        store.settle(attempt, AGAIN, only_expired=True)


# -- jobs whose size is not known yet


def test_a_job_without_a_size_is_not_claimed_until_it_has_one(store: Store) -> None:
    submit(store, new_job("b.1", queue="", need=0))

    assert states(store, "b.1") == ["waiting"]
    assert claim(store) is None
    assert store.sweep(30).unsized == ["b.1"]
    assert store.size("b.1", 3 * GIB, "gpu8") == ["gpu8"]
    assert store.size("b.1", 9 * GIB, "gpu16") == [], "the second sweeper came too late"
    assert store.sweep(30).unsized == []
    assert must_claim(store, free=3 * GIB).job_id == "b.1"


def test_an_evaluation_without_a_size_waits_for_its_size_and_for_its_adapter(store: Store) -> None:
    submit(store, new_job("b.1"), new_job("b.1.eval", queue="", need=0, needs=("b.1",)))

    assert store.size("b.1.eval", GIB, "gpu8") == []
    assert states(store, "b.1.eval") == ["waiting"]
    assert store.settle(must_claim(store), SUCCEEDED) == ["gpu8"]
    assert states(store, "b.1.eval") == ["queued"]


def test_a_job_that_can_never_run_is_refused_with_a_reason(store: Store) -> None:
    report = new_job("b.report", kind="report", device="control", queue="control", need=0, follows=("b.1",))
    submit(store, new_job("b.1", queue="", need=0), report)

    assert store.refuse("b.1", "bad_spec", "no such model") == ["control"]

    job = store.job("b.1")
    assert (job.state, job.reason, job.message) == (JobState.FAILED, FailureReason.BAD_SPEC, "no such model")
    assert store.sweep(30).unsized == []
    assert store.refuse("b.report", "bad_spec", "too late: it is queued") == []


# -- workers


def test_a_worker_of_a_newer_release_is_listed_with_what_this_one_knows(store: Store) -> None:
    info = {"host": "h", "device": "cpu", "uuid": "", "usable_bytes": 1, "slots": 1, "running": [], "every_s": 5}
    store.heartbeat("h/cpu", "cpu", {**info, "colour": "green"})

    assert [worker.id for worker in store.workers()] == ["h/cpu"]


def test_a_worker_is_seen_until_it_leaves_and_is_not_alive_when_it_falls_silent(store: Store) -> None:
    info = {"host": "h", "device": "cpu", "uuid": "", "usable_bytes": GIB, "slots": 2, "running": ["b.1"]}
    store.heartbeat("h/cpu", "cpu", {**info, "every_s": 5.0})
    store.heartbeat("h/old", "cpu", {**info, "every_s": 0.01})

    alive, silent = wait_for(
        lambda: [w for w in [store.workers()] if not w[1].alive], 5, "the second worker counts as silent"
    )[0]
    assert (alive.id, alive.alive, alive.running, alive.usable_bytes) == ("h/cpu", True, ("b.1",), GIB)
    assert silent.id == "h/old"
    store.leave("h/old")
    assert [worker.id for worker in store.workers()] == ["h/cpu"]
