"""After another server process, or a jump of its clock, nobody who could not renew for a lease loses his job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from helpers import (
    AGAIN,
    SUCCEEDED,
    RestartableServer,
    claim,
    must_claim,
    new_job,
    preload,
    restartable_server,
    states,
    submit,
    wait_for,
)

from jobqueue.errors import ServerError, StaleAttemptError
from jobqueue.job import JobState
from jobqueue.store import Settlement, Store

LEASE_S = 1.0
EVERY_S = 0.05  # a sweep, in these tests


@pytest.fixture
def restartable(tmp_path: Path) -> Iterator[RestartableServer]:
    with restartable_server(tmp_path / "server") as server:
        yield server


def test_after_a_restart_nothing_is_given_and_nothing_taken_for_one_lease(restartable: RestartableServer) -> None:
    store = Store(restartable.url)
    submit(store, new_job("b.1"), new_job("b.2"))
    running = must_claim(store, lease_s=LEASE_S)
    restartable.restart()

    assert claim(store, lease_s=LEASE_S) is None  # the quiet time begins with the first call
    began = time.monotonic()

    def offered() -> object:
        found = store.sweep(EVERY_S)
        taken = claim(store, lease_s=LEASE_S)
        assert bool(found.expired) <= (time.monotonic() - began > LEASE_S * 0.9), "expired in the quiet time"
        return taken

    taken = wait_for(offered, 10, "claims are answered again")
    assert time.monotonic() - began > LEASE_S * 0.9
    assert taken.job_id == "b.2"  # type: ignore[attr-defined]
    lost = [("b.1", 1, running.nonce)]
    wait_for(lambda: store.sweep(EVERY_S).expired == lost, 5, "whoever did not renew meanwhile is lost")


def test_an_attempt_that_renews_in_the_quiet_time_keeps_its_job(restartable: RestartableServer) -> None:
    """optuna#4234: a live trial was marked as failed."""
    store = Store(restartable.url)
    submit(store, new_job("b.1"))
    running = must_claim(store, lease_s=LEASE_S)
    restartable.restart()
    assert store.sweep(EVERY_S).expired == []

    def given() -> bool:
        store.renew(running)
        assert store.sweep(EVERY_S).expired == []
        ours, till = store._redis.hmget("{loraq}:lease_clock", "time", "quiet_until")
        return float(str(till)) < float(str(ours))

    wait_for(given, 10, "the quiet time is over")
    store.settle(running, SUCCEEDED)
    assert states(store, "b.1") == ["succeeded"]


def test_the_quiet_time_is_the_longest_lease_of_all_hosts_whoever_asks(restartable: RestartableServer) -> None:
    """One host has LORAQ_LEASE_S=60, another one 1: what it claimed in the server's last second may be at work."""
    store = Store(restartable.url)
    submit(store, new_job("b.1"), new_job("b.2"))
    claim(store, "slow/gpu0", lease_s=60, queues=["gpu141"])
    must_claim(store, "quick/gpu0", lease_s=LEASE_S)
    restartable.restart()

    assert claim(store, "quick/gpu0", lease_s=LEASE_S) is None
    ours, till = store._redis.hmget("{loraq}:lease_clock", "time", "quiet_until")
    assert float(str(till)) - float(str(ours)) == 60_000


def test_whoever_looks_is_told_for_how_long_nothing_starts(restartable: RestartableServer) -> None:
    """An idle worker beside jobs of which each waits for its turn looks broken."""
    store = Store(restartable.url)
    submit(store, new_job("b.1"), new_job("b.2"))
    must_claim(store, lease_s=60)
    assert store.overview("", "", 10).quiet_s == 0
    restartable.restart()
    store.sweep(EVERY_S)
    info = {"host": "box", "uuid": "GPU-1", "usable_bytes": 80 * 1024**3, "slots": 2, "running": [], "every_s": 60}
    store.heartbeat("box/gpu0", "gpu", {**info, "device": "H100"})

    seen = store.overview("", "", 10)
    assert 50 < seen.quiet_s <= 60
    assert seen.queue[0].waits_for in {f"{left} s, as the server was started anew" for left in range(51, 61)}


def test_each_lease_has_its_own_length_whoever_sweeps(store: Store) -> None:
    submit(store, new_job("b.1"), new_job("b.2"))
    slow, quick = must_claim(store, lease_s=60), must_claim(store, lease_s=0.2)
    for running in (slow, quick):
        store.renew(running)

    wait_for(lambda: store.sweep(EVERY_S).expired == [("b.2", 1, quick.nonce)], 5, "the short one has ended")
    assert [job.lease_s for job in store.jobs(["b.1", "b.2"])] == [60, 0.2]


def test_after_an_orderly_restart_work_goes_on_at_once(restartable: RestartableServer) -> None:
    store = Store(restartable.url)
    submit(store, new_job("b.1"), new_job("b.2"))
    must_claim(store)
    store.orderly()
    restartable.restart(signal.SIGTERM)

    assert must_claim(store).job_id == "b.2"


def test_a_worker_that_starts_after_a_long_idle_time_is_given_work_at_once(store: Store) -> None:
    submit(store, new_job("b.1"))
    store.settle(must_claim(store, lease_s=0.1), AGAIN)
    seen = float(str(store._redis.hget("{loraq}:lease_clock", "seen_at")))

    wait_for(lambda: store._redis.time()[0] * 1000 > seen + 1100, 5, "nobody has asked for longer than a lease")

    assert must_claim(store, lease_s=0.1).attempt == 2


CLOCK = """\
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec real;
    char text[32] = "";
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &real);
    int file = open(getenv("CLOCK_AHEAD"), O_RDONLY);
    if (file >= 0) {
        read(file, text, 31);
        close(file);
    }
    now->tv_sec = real.tv_sec + atol(text);
    now->tv_usec = real.tv_nsec / 1000;
    return 0;
}
"""


class Clock:
    """Of a server; tests set it."""

    def __init__(self, folder: Path) -> None:
        self._ahead = folder / "ahead"
        library = preload(folder, CLOCK)
        self.environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_AHEAD": str(self._ahead)}

    def jump(self, store: Store, seconds: int) -> None:
        new = self._ahead.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._ahead)
        # the server looks at it ten times a second
        wait_for(lambda: abs(store._redis.time()[0] - time.time() - seconds) < 5, 10, "the clock has jumped")


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def there(clock: Clock, tmp_path: Path) -> Iterator[Store]:
    """The store of a server with that clock."""
    with restartable_server(tmp_path / "there", environment=clock.environment) as server:
        opened = Store(server.url)
        yield opened
        opened.close()


def age(store: Store, job_id: str, seconds: float) -> None:
    """Its last renewal was so long ago."""
    store._redis.zincrby("{loraq}:running", -1000 * seconds, job_id)


def lease_left_s(store: Store, job_id: str) -> float:
    store.sweep(2)  # which looks at the clock
    ours = float(str(store._redis.hget("{loraq}:lease_clock", "time")))
    return (store._redis.zscore("{loraq}:running", job_id) - ours) / 1000


@pytest.mark.parametrize("seconds", [3600, 40, 28, -28, -3600])
def test_after_a_jump_of_the_clock_a_lease_lasts_as_long_as_before_and_work_is_given(
    there: Store, clock: Clock, seconds: int
) -> None:
    """A worker that is cut off has until its guardian's deadline, whatever the server's clock does."""
    submit(there, new_job("b.1"), new_job("b.2"))
    must_claim(there, lease_s=60)
    age(there, "b.1", 45)
    assert there.sweep(2).expired == []
    clock.jump(there, seconds)

    assert there.sweep(2).expired == []
    assert 15 - 4 - 5 < lease_left_s(there, "b.1") < 15.1, "less a stride, and what this test took"
    assert must_claim(there, lease_s=60).job_id == "b.2"
    age(there, "b.1", 13)
    assert there.sweep(2).expired == [], "the jump may have counted as a stride"
    age(there, "b.1", 10)
    assert [job_id for job_id, *_ in there.sweep(2).expired] == ["b.1"]


def test_after_a_clock_went_back_a_silent_worker_is_waited_for_one_lease_and_a_delay_is_as_long_as_it_was(
    there: Store, clock: Clock
) -> None:
    submit(there, new_job("b.1"), new_job("b.2"))
    must_claim(there, lease_s=60)
    there.settle(must_claim(there, lease_s=60), Settlement(JobState.QUEUED, "storage", "away", delay_s=100))
    info = {"host": "h", "device": "NVIDIA", "uuid": "", "usable_bytes": 1, "slots": 1, "running": [], "every_s": 5}
    there.heartbeat("h/gpu0", "gpu", info)
    there.sweep(2)
    clock.jump(there, -3600)
    there.sweep(2)

    now = there._redis.time()[0]
    assert 50 < lease_left_s(there, "b.1") <= 60
    assert 80 < there._redis.zscore("{loraq}:delayed", "b.2") / 1000 - now <= 101
    assert there._redis.zscore("{loraq}:gpu_workers", "h/gpu0") / 1000 <= now + 1
    assert [worker.alive for worker in there.workers()] == [False], "until it is heard of again"
    there.heartbeat("h/gpu0", "gpu", info)
    assert [worker.alive for worker in there.workers()] == [True]


def test_a_jump_of_the_clock_right_after_a_restart_does_not_cut_the_quiet_time_short(
    clock: Clock, tmp_path: Path
) -> None:
    """A machine that boots may set its clock when its server runs already."""
    with restartable_server(tmp_path / "there", environment=clock.environment) as server:
        store = Store(server.url)
        submit(store, new_job("b.1"), new_job("b.2"))
        must_claim(store, lease_s=60)
        server.restart()
        assert claim(store, lease_s=60) is None
        clock.jump(store, 3600)
        store._redis.hincrby("{loraq}:lease_clock", "quiet_until", -57_000)  # so much of it has passed

        assert store.sweep(2).expired == []
        assert claim(store, lease_s=60) is None, "the jump may have counted as a stride"
        store._redis.hincrby("{loraq}:lease_clock", "quiet_until", -10_000)
        assert must_claim(store, lease_s=60).job_id == "b.2"


def test_what_a_jump_has_counted_for_one_who_sweeps_seldom_takes_no_lease_early_for_one_who_sweeps_often(
    there: Store, clock: Clock
) -> None:
    """Hosts may differ in LORAQ_SWEEP_S."""
    submit(there, new_job("b.1"))
    must_claim(there, lease_s=60)
    for every_s in (20, 0.5):
        there.sweep(every_s)
    clock.jump(there, 3600)
    there.sweep(20)
    age(there, "b.1", 45)

    assert there.sweep(0.5).expired == []
    age(there, "b.1", 16)
    assert [job_id for job_id, *_ in there.sweep(0.5).expired] == ["b.1"]


# -- another server takes over


@pytest.fixture
def replica(restartable: RestartableServer, tmp_path: Path) -> Iterator[redis.Redis]:
    """It has what `restartable` has, a moment later."""
    with redis.Redis.from_url(restartable.url) as primary:
        primary.config_set("repl-diskless-sync-delay", 0)
    with (
        restartable_server(tmp_path / "replica", "--replicaof", f"127.0.0.1 {restartable.port}") as server,
        redis.Redis.from_url(server.url, decode_responses=True) as client,
    ):
        wait_for(lambda: client.info("replication")["master_link_status"] == "up", 30, "the replica follows")
        yield client


def same(replica: redis.Redis) -> Store:
    """The store of the replica, which is a server of its own from now on."""
    replica.replicaof("NO", "ONE")
    where = replica.connection_pool.connection_kwargs
    return Store(f"redis://{where['host']}:{where['port']}/0")


def test_after_a_failover_who_renews_keeps_the_job_and_what_the_last_second_held_is_refused(
    restartable: RestartableServer, replica: redis.Redis
) -> None:
    old = Store(restartable.url)
    submit(old, new_job("b.1"), new_job("b.2"))
    known = must_claim(old, lease_s=LEASE_S)
    assert old._redis.wait(1, 5000) == 1
    new = same(replica)
    lost = must_claim(old, lease_s=LEASE_S)

    began = time.monotonic()

    def taken() -> object:
        assert new.renew(known) is False
        assert new.sweep(EVERY_S).expired == []
        return claim(new, lease_s=LEASE_S)

    again = wait_for(taken, 10, "claims are answered again")
    assert time.monotonic() - began > LEASE_S * 0.9
    assert again.job_id == lost.job_id  # type: ignore[attr-defined]
    assert again.attempt == lost.attempt, "the fence went back"  # type: ignore[attr-defined]
    for late in (
        new.renew,
        lambda claim: new.settle(claim, SUCCEEDED),
        lambda claim: new.append(claim, [("log", "x")], 0),
    ):
        with pytest.raises(StaleAttemptError):
            late(lost)
    new.settle(known, SUCCEEDED)
    assert states(new, "b.1", "b.2") == ["succeeded", "running"]


def test_an_old_primary_that_lives_on_renews_nothing_where_it_takes_no_writes_alone(
    restartable: RestartableServer, replica: redis.Redis
) -> None:
    """With min-replicas-to-write: a worker that reaches only the old one ends its trainer with the lease."""
    old = Store(restartable.url)
    old._redis.config_set("min-replicas-to-write", 1)
    old._redis.config_set("min-replicas-max-lag", 1)
    wait_for(lambda: old._redis.info("replication").get("min_slaves_good_slaves") == 1, 10, "its replica is there")
    submit(old, new_job("b.1"), new_job("b.2"))
    running = must_claim(old, lease_s=60)
    same(replica)

    def refused() -> bool:
        try:
            old.renew(running)
        except ServerError as error:
            return "NOREPLICAS" in error.what
        return False

    wait_for(refused, 10, "it takes no writes alone")
    with pytest.raises(ServerError, match="NOREPLICAS"):
        claim(old)
