"""What the chaos driver has found, each in its smallest form."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from helpers import RestartableServer, must_claim, restartable_server, submit, wait_for
from hosts import STUB, Host, alive
from jobs import evaluation, train

from gpu_worker import guardian
from gpu_worker import pool as pools
from gpu_worker.lease import Lease
from gpu_worker.pool import TrainerPool
from gpu_worker.trainer_process import Ended
from jobqueue.errors import ServerError, StaleAttemptError
from jobqueue.job import FailureReason, JobState
from jobqueue.settings import Settings
from jobqueue.store import Store

START_S = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RestartableServer]:
    with restartable_server(tmp_path / "server") as running:
        yield running


@pytest.fixture
def store(server: RestartableServer) -> Iterator[Store]:
    opened = Store(server.url)
    yield opened
    opened.close()


@pytest.fixture
def host(server: RestartableServer, tmp_path: Path) -> Iterator[Host]:
    made = Host("h1", tmp_path, server.url)
    try:
        made.start()
        yield made
    finally:
        made.close()


def trains(host: Host, job_id: str) -> None:
    wait_for(lambda: (host.beats / job_id).exists(), START_S, f"{job_id} trains")


def test_a_worker_whose_celery_ends_at_the_memory_limit_keeps_its_job_and_listens_again(
    server: RestartableServer, store: Store, host: Host
) -> None:
    submit(store, train("b.1", "b", "/stub/sleep:2"))
    trains(host, "b.1")
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1_000_000)
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind)
        wait_for(lambda: "Celery has ended by itself" in host.log.read_text(), START_S, "Celery ends")
        client.config_set("maxmemory", 0)

        wait_for(lambda: store.job("b.1").state.final, START_S, "the job ends")
        job = store.job("b.1")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
        wait_for(lambda: any(e["cmd"] == "brpop" for e in client.client_list()), START_S, "it hears tokens again")


@pytest.mark.parametrize("supervisor_too", [False, True])
def test_a_child_whose_guardian_and_worker_were_killed_at_once_is_ended_by_whoever_starts_next(
    store: Store, host: Host, supervisor_too: bool
) -> None:
    submit(store, train("b.1", "b", "/stub/deaf/child/sleep:60"))
    trains(host, "b.1")
    [celery] = host.celery("cpu")
    before = host.left(trainers_only=True)
    assert len(before) == 3, "guardian, trainer, child"
    celery.send_signal(signal.SIGSTOP)  # so that it cannot look after what its guardian leaves
    next(process for process in before if guardian.__file__ in process.cmdline()).kill()
    if supervisor_too:
        host.tell(signal.SIGKILL)
        wait_for(lambda: not host.runs, START_S, "the supervisor has ended")
        host.start()
    else:
        celery.kill()

    wait_for(lambda: not alive(before), START_S, "nothing is left of the trainer")


def test_a_server_that_is_away_while_an_evaluation_looks_for_its_adapter_is_no_fault_of_the_job(
    store: Store, host: Host, server: RestartableServer
) -> None:
    """The claim, the only call before it, has just been answered; what comes next is refused for a while."""
    submit(store, train("b.1", "b", "/stub/sleep:0.1"))
    wait_for(lambda: store.job("b.1").state.final, START_S, "the adapter is there")
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-hgetall")  # no record can be read whole
        submit(store, evaluation("c.1", "c", "/stub/sleep:0.1", "b.1"))
        wait_for(lambda: "c.1: no answer yet" in host.log.read_text(), START_S, "the evaluation asks in vain")
        client.execute_command("ACL", "SETUSER", "default", "+hgetall")

    wait_for(lambda: store.job("c.1").state.final, START_S, "the evaluation ends")
    job = store.job("c.1")
    assert (job.state, job.attempt, job.failures) == (JobState.SUCCEEDED, 1, 0)


def test_a_mount_that_goes_while_a_trainer_works_takes_nothing_from_it(store: Store, host: Host) -> None:
    """A checkpoint that was read where it lay, on the mount, ended the job: `internal`, not tried again."""
    submit(store, train("b.1", "b", "/stub/sleep:0.1"))
    wait_for(lambda: store.job("b.1").state.final, START_S, "the adapter is there")
    submit(store, evaluation("c.1", "c", "/stub/sleep:0.5/await:go", "b.1"))
    trains(host, "c.1")
    host.unmount()
    (host.beats / "go").write_text("")

    wait_for(lambda: store.job("c.1").history, START_S, "the attempt ends")
    end = store.job("c.1").history[0]
    assert end["reason"] == FailureReason.STORAGE, "it had its adapter; only the result cannot be written"


@pytest.mark.parametrize("end", ["the job is another's", "the worker has to go"])
def test_a_question_to_a_server_that_stays_away_has_an_end(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    submit(store, train("b.1", "b", "/stub/sleep:1"))
    settings = Settings(redis_url=store.url, data_dir=tmp_path, lease_s=0.6, renew_s=0.1, sweep_s=0.1)
    leaving = threading.Event()
    claim = must_claim(store, lease_s=0.6)

    def away(*_: object) -> None:
        raise ServerError("it is away")

    monkeypatch.setattr(store, "renew", away)  # else the lease would go on and on
    lease = Lease(store, claim, settings, guardian.now() - 0.6, leaving)

    def ask() -> None:
        (lease.lost if end == "the job is another's" else leaving).set()
        away()

    try:
        with pytest.raises(StaleAttemptError):
            lease.insist(ask)
    finally:
        lease.close()
    assert store.job("b.1").reason is not FailureReason.BAD_SPEC


def test_a_trainer_that_was_ended_right_after_its_result_is_not_kept_for_the_next_job(tmp_path: Path) -> None:
    pool = TrainerPool({"PATH": os.environ["PATH"]}, tmp_path, 0.5, [sys.executable, str(STUB)])
    trainer = pool.take("/stub/a")
    trainer.guardian.kill()
    wait_for(lambda: any(isinstance(m, Ended) for m in trainer.messages(0.1)), START_S, "its end is heard of")
    pool.give_back(trainer, "/stub/a", clean=True)

    assert pool.resting == 0
    other = pool.take("/stub/a")
    try:
        assert other is not trainer
        assert other.alive()
    finally:
        other.kill()


def test_spares_that_were_killed_after_a_long_life_are_replaced_as_soon_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "CALM_S", 0.0)
    monkeypatch.setattr(pools, "FIRST_PAUSE_S", 0.05)
    pool = TrainerPool({"PATH": os.environ["PATH"]}, tmp_path, 0.5, [sys.executable, str(STUB)], 1)

    def one_rests() -> bool:
        pool.tend()
        return pool.resting == 1

    def none_rests() -> bool:
        pool.tend()
        return pool.resting == 0

    try:
        for _ in range(12):  # a pause that doubled each time would be 100 s by now
            wait_for(one_rests, 30, "a spare rests")
            pool._resting[0].trainer.guardian.kill()
            wait_for(none_rests, 30, "its end is noticed")
        wait_for(one_rests, 10, "the next is started at once")
    finally:
        pool.close()
