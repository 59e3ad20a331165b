"""The fences of the store: only the attempt that owns a job may write, and what it says twice is done once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import AGAIN, LEASE_S, SUCCEEDED, must_claim, new_job, snapshot, states, submit

from jobqueue.errors import StaleAttemptError
from jobqueue.job import Claim, FailureReason, JobState
from jobqueue.memory import GIB
from jobqueue.store import Settlement, Store


def test_writes_of_an_older_attempt_are_refused(store: Store) -> None:
    submit(store, new_job("b.1"))
    old = must_claim(store)
    store.settle(old, AGAIN)
    new = must_claim(store, "host/gpu1")
    before = store.job("b.1")

    assert (old.attempt, new.attempt) == (1, 2)
    for write in (store.renew, lambda c: store.append(c, [("log", "late")], 0)):
        with pytest.raises(StaleAttemptError):
            write(old)
    late = replace(old, nonce="0" * 16)
    with pytest.raises(StaleAttemptError):
        store.settle(late, SUCCEEDED)
    assert store.job("b.1") == before
    assert not [event for event in store.events("b.1", "0", 0) if event.text == "late"]


@pytest.mark.parametrize("wrong", [{"nonce": "0" * 16}, {"attempt": 2}])
def test_a_fence_needs_both_the_number_and_the_nonce(store: Store, wrong: dict[str, object]) -> None:
    submit(store, new_job("b.1"))
    right = must_claim(store)
    forged: Claim = replace(right, **wrong)  # type: ignore[arg-type]

    for write in (store.renew, lambda c: store.append(c, [("log", "x")], 0), lambda c: store.settle(c, SUCCEEDED)):
        with pytest.raises(StaleAttemptError):
            write(forged)
    assert store.renew(right) is False


def test_a_claim_asked_for_again_since_no_answer_came_is_the_same_claim(store: Store) -> None:
    submit(store, new_job("b.1"), new_job("b.2"))
    first = store.claim("host/gpu0", "gpu", GIB, LEASE_S, "one", ["gpu8"])
    assert first is not None

    store.cancel(["b.1"])
    assert store.claim("host/gpu0", "gpu", GIB, LEASE_S, "one", ["gpu8"]) == first
    assert store.renew(first), "that it was to be cancelled is not forgotten"
    assert states(store, "b.1", "b.2") == ["running", "queued"]


def test_a_nonce_that_was_used_and_comes_again_is_another_claim(store: Store) -> None:
    submit(store, new_job("b.1"))
    for attempt in (1, 2):
        claim = store.claim("host/gpu0", "gpu", GIB, LEASE_S, "one", ["gpu8"])
        assert claim is not None
        assert claim.attempt == attempt
        store.settle(claim, AGAIN)
        assert (store.job("b.1").state, store.job("b.1").failures) == (JobState.QUEUED, attempt)


def test_a_settlement_said_twice_is_done_once_and_answered_alike(store: Store) -> None:
    submit(store, new_job("b.1"))
    attempt = must_claim(store)
    store.settle(attempt, AGAIN)
    after = snapshot(store.url)

    assert store.settle(attempt, AGAIN) == []
    with pytest.raises(StaleAttemptError):
        store.settle(attempt, SUCCEEDED)
    assert snapshot(store.url) == after
    job = store.job("b.1")
    assert (job.state, job.failures, len(job.history)) == (JobState.QUEUED, 1, 1)


def test_the_attempt_number_only_grows_and_a_drain_costs_no_failure(store: Store) -> None:
    submit(store, new_job("b.1"))
    drained = Settlement(JobState.QUEUED, FailureReason.PREEMPTED, "told to stop", counts=False)
    for number, end in enumerate([drained, AGAIN, drained, AGAIN], start=1):
        attempt = must_claim(store)
        assert attempt.attempt == number
        store.settle(attempt, end)

    job = store.job("b.1")
    assert (job.attempt, job.failures) == (4, 2)
    assert [ended["attempt"] for ended in job.history] == [1, 2, 3, 4]


def test_log_lines_that_are_sent_again_since_no_answer_came_are_there_once(store: Store) -> None:
    submit(store, new_job("b.1"))
    attempt = must_claim(store)
    lines = [("log", str(number)) for number in range(6)]

    store.append(attempt, lines[:3], 0)
    store.append(attempt, lines[:3], 0)
    store.append(attempt, lines[1:5], 1)
    store.append(attempt, lines[5:], 5)

    assert [event.text for event in store.events("b.1", "0", 0) if event.kind == "log"] == list("012345")


def test_a_running_job_has_its_worker_progress_and_log(store: Store) -> None:
    submit(store, new_job("b.1"))
    attempt = must_claim(store)
    store.append(attempt, [("log", "ü {}"), ("progress", '{"phase": "train", "step": 3}'), ("log", "second")], 0)

    job = store.job("b.1")
    assert (job.state, job.worker, job.progress["step"]) == (JobState.RUNNING, "host/gpu0", 3)
    assert [event.text for event in store.events("b.1", "0", 0) if event.kind == "log"] == ["ü {}", "second"]
    assert attempt.lease_s == LEASE_S
