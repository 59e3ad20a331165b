"""A hold on a job where the server refuses, and where the machine has no thread or no memory left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import SUCCEEDED, RestartableServer, must_claim, new_job, submit, wait_for
from worker_process import STUB, train_job

from gpu_worker import guardian
from gpu_worker.gpu import Device
from gpu_worker.lease import Lease
from gpu_worker.worker import Worker
from jobqueue.errors import ServerError, StaleAttemptError, UnansweredError
from jobqueue.job import JobState
from jobqueue.settings import Settings
from jobqueue.store import Store

LEASE_S = 0.6
SOON_S = 30.0


@pytest.fixture
def store(server: RestartableServer) -> Iterator[Store]:
    opened = Store(server.url)
    yield opened
    opened.close()


@pytest.fixture
def settings(store: Store, tmp_path: Path) -> Settings:
    times = {"lease_s": LEASE_S, "renew_s": 0.1, "sweep_s": 0.1}
    return Settings(
        redis_url=store.url, data_dir=tmp_path, trainer_command=(sys.executable, str(STUB)), owner="ann", **times
    )


@pytest.fixture
def lease(store: Store, settings: Settings) -> Iterator[Lease]:
    submit(store, new_job("b.1"))
    held = Lease(store, must_claim(store, lease_s=LEASE_S), settings, guardian.now(), threading.Event())
    yield held
    held.close()


def refuses(*_: object, **__: object) -> None:
    raise ServerError("Redis refuses: no such command")


def test_a_settlement_that_is_refused_for_good_frees_its_slot_after_a_lease(
    lease: Lease, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "settle", refuses)
    began = time.monotonic()

    assert lease.settle(SUCCEEDED) == []
    assert time.monotonic() - began >= LEASE_S
    assert not lease.overran, "it was renewed all the time"


def test_a_question_that_is_refused_for_good_frees_its_slot_after_a_lease(lease: Lease) -> None:
    with pytest.raises(StaleAttemptError):
        lease.insist(refuses)
    assert not lease.overran


@pytest.mark.parametrize("how", ["it does not answer", "it refuses renewals as well"])
def test_a_server_that_is_away_for_three_leases_is_waited_for(
    lease: Lease, store: Store, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    settle, renew, back_at = store.settle, store.renew, time.monotonic() + 3 * LEASE_S

    def away(call: Callable[..., object]) -> Callable[..., object]:
        def asked(*words: object) -> object:
            if time.monotonic() < back_at:
                raise UnansweredError("away") if how == "it does not answer" else ServerError("its disk is full")
            return call(*words)

        return asked

    monkeypatch.setattr(store, "settle", away(settle))
    if how == "it refuses renewals as well":
        monkeypatch.setattr(store, "renew", away(renew))
    lease.settle(SUCCEEDED)

    assert store.job("b.1").state is JobState.SUCCEEDED


def test_a_renewal_that_broke_off_is_not_the_last(lease: Lease, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, failures = store.renew, iter([MemoryError(), OSError("no memory")])

    def scarce(*words: object) -> object:
        if error := next(failures, None):
            raise error
        return renew(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "renew", scarce)
    first = lease.deadline

    wait_for(lambda: lease.deadline > first + LEASE_S, SOON_S, "it is renewed all the same")


def test_a_job_whose_lease_no_thread_can_renew_goes_back_at_no_cost(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(Device("cpu", "cpu"), settings, store.url)
    wait_for(lambda: worker.well(), SOON_S, "it has tried its storage")
    start = threading.Thread.start

    def no_lease(thread: threading.Thread) -> None:
        if thread.name.startswith("lease-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_lease)
    submit(store, new_job("b.1", queue="cpu"))
    worker.work(wait=True)
    assert worker.note() == "it pauses: a lease cannot be renewed: can't start new thread"
    worker.tend()

    job = store.job("b.1")
    assert (job.state, job.failures, job.history[0]["reason"]) == (JobState.QUEUED, 0, "preempted")
    worker.leave()


def test_a_claim_that_is_given_back_and_taken_by_another_slot_at_once_keeps_its_promise_of_memory(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that start together claim one after the other: the next one takes what the first could not begin."""
    worker = Worker(Device("cpu", "cpu"), settings, store.url, slots=2)
    wait_for(lambda: worker.well(), SOON_S, "it has tried its storage")
    start, refused = threading.Thread.start, iter([RuntimeError("can't start new thread")])
    spoilt, second = worker._spoilt, threading.Thread(target=worker._work_once)

    def no_first_lease(thread: threading.Thread) -> None:
        if thread.name.startswith("lease-") and (error := next(refused, None)):
            raise error
        start(thread)

    def pause_while_another_slot_claims(sick: str) -> None:
        if sick:
            second.start()
            wait_for(lambda: worker.pool.at_work or not second.is_alive(), SOON_S, "the other slot has asked")
        spoilt(sick)

    monkeypatch.setattr(threading.Thread, "start", no_first_lease)
    monkeypatch.setattr(worker, "_spoilt", pause_while_another_slot_claims)
    submit(store, train_job("b.1", "sleep:1", queue="cpu"))
    worker.work(wait=True)
    second.join(SOON_S)
    worker.tend()

    job = store.job("b.1")
    worker.leave()
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1), job.message


def test_an_attempt_that_cannot_be_made_renews_no_lease(store: Store, settings: Settings) -> None:
    """Its job would be nobody's, and never be taken back."""
    worker = Worker(Device("cpu", "cpu"), settings, store.url)
    submit(store, new_job("b.1", spec={"kind": "train", "training": None}))
    claim = must_claim(store, lease_s=LEASE_S)

    with pytest.raises(AttributeError):
        worker._run(claim, guardian.now())
    assert [thread.name for thread in threading.enumerate() if thread.name == "lease-b.1"] == []
    worker.leave()
