"""The store when its server is restarted, full, stopped, locked or away, and when two workers ask at one moment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
    restartable_server,
    snapshot,
    states,
    submit,
    wait_for,
)

from jobqueue.errors import ServerError
from jobqueue.job import JobState
from jobqueue.store import NewJob, Settlement, Store

LEASE_S = 1.0
ROUNDS = 60
RACER = Path(__file__).parent / "store_racer.py"


@pytest.fixture
def restartable(tmp_path: Path) -> Iterator[RestartableServer]:
    with restartable_server(tmp_path / "server") as server:
        yield server


# -- quiet time


def test_after_a_restart_nothing_is_given_and_nothing_taken_for_one_lease(restartable: RestartableServer) -> None:
    store = Store(restartable.url)
    submit(store, new_job("b.1"), new_job("b.2"))
    running = must_claim(store, lease_s=LEASE_S)
    restartable.restart()

    assert claim(store, lease_s=LEASE_S) is None  # the quiet time begins with the first call
    began = time.monotonic()

    def offered() -> object:
        found = store.sweep(LEASE_S)
        taken = claim(store, lease_s=LEASE_S)
        assert bool(found.expired) <= (time.monotonic() - began > LEASE_S * 0.9), "expired in the quiet time"
        return taken

    taken = wait_for(offered, 10, "claims are answered again")
    assert time.monotonic() - began > LEASE_S * 0.9
    assert taken.job_id == "b.2"  # type: ignore[attr-defined]
    assert store.sweep(LEASE_S).expired == [("b.1", 1, running.nonce)], "whoever did not renew meanwhile is lost"


def test_an_attempt_that_renews_in_the_quiet_time_keeps_its_job(restartable: RestartableServer) -> None:
    """optuna#4234: a live trial was marked as failed."""
    store = Store(restartable.url)
    submit(store, new_job("b.1"))
    running = must_claim(store, lease_s=LEASE_S)
    restartable.restart()
    assert store.sweep(LEASE_S).expired == []

    def given() -> bool:
        store.renew(running)
        assert store.sweep(LEASE_S).expired == []
        till = store._redis.hget("{loraq}:clock", "quiet_until")
        return float(str(till)) < time.time() * 1000

    wait_for(given, 10, "the quiet time is over")
    store.settle(running, SUCCEEDED)
    assert states(store, "b.1") == ["succeeded"]


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
    seen = float(str(store._redis.hget("{loraq}:clock", "seen_at")))

    wait_for(lambda: store._redis.time()[0] * 1000 > seen + 1100, 5, "nobody has asked for longer than a lease")

    assert must_claim(store, lease_s=0.1).attempt == 2


def jump(store: Store, seconds: float) -> None:
    """The server's clock goes by that much: seen from it, all that was written down goes the other way."""
    client = store._redis
    for name in ("running", "delayed"):
        for job_id in client.zrange(f"{{loraq}}:{name}", 0, -1):
            client.zincrby(f"{{loraq}}:{name}", -1000 * seconds, job_id)
    client.hincrby("{loraq}:clock", "seen_at", round(-1000 * seconds))


@pytest.mark.parametrize("seconds", [3600, 40, -3600])
def test_after_a_jump_of_the_clock_no_lease_ends_and_nothing_is_given_until_all_have_renewed(
    store: Store, seconds: float
) -> None:
    submit(store, new_job("b.1"), new_job("b.2"))
    running = must_claim(store, lease_s=60)
    age(store, "b.1", 30)
    assert store.sweep(60).expired == []
    jump(store, seconds)

    assert store.sweep(60).expired == []
    assert claim(store, lease_s=60) is None
    store.renew(running)
    quiet = float(str(store._redis.hget("{loraq}:clock", "quiet_until"))) / 1000 - store._redis.time()[0]
    assert 55 < quiet <= 61


def age(store: Store, job_id: str, seconds: float) -> None:
    """Its last renewal was so long ago."""
    store._redis.zincrby("{loraq}:running", -1000 * seconds, job_id)


def test_after_a_jump_of_less_than_half_a_lease_whoever_renews_at_a_third_has_lost_nothing(store: Store) -> None:
    submit(store, new_job("b.1"))
    must_claim(store, lease_s=60)
    age(store, "b.1", 20)
    jump(store, 29)

    assert store.sweep(60).expired == []


def test_after_a_clock_went_back_a_silent_worker_is_waited_for_one_lease_and_a_delay_is_as_long_as_it_was(
    store: Store,
) -> None:
    submit(store, new_job("b.1"), new_job("b.2"))
    must_claim(store, lease_s=60)
    store.settle(must_claim(store, lease_s=60), Settlement(JobState.QUEUED, "storage", "away", delay_s=100))
    store.sweep(60)
    jump(store, -3600)
    store.sweep(60)

    now = store._redis.time()[0]
    assert store._redis.zscore("{loraq}:running", "b.1") / 1000 - now <= 61
    assert 90 < store._redis.zscore("{loraq}:delayed", "b.2") / 1000 - now <= 101


# -- memory


@pytest.fixture
def full(redis_url: str) -> Iterator[Store]:
    """Two jobs of which one runs, on a server that has no memory left."""
    store = Store(redis_url)
    submit(store, new_job("b.1"), new_job("b.2"))
    store.sweep(30)
    with redis.Redis.from_url(redis_url) as client:
        yield store
        client.config_set("maxmemory", 0)
    store.close()


def fill(store: Store) -> None:
    with redis.Redis.from_url(store.url) as client:
        client.config_set("maxmemory", 1)


def test_at_the_memory_limit_a_submission_is_refused_with_nothing_written(full: Store) -> None:
    before = snapshot(full.url)
    fill(full)

    with pytest.raises(ServerError, match="at its memory limit; nothing was written"):
        submit(full, new_job("c.1"), new_job("c.2"))

    assert snapshot(full.url) == before
    assert full.batch_names() == ["b"]


def test_at_the_memory_limit_what_runs_is_renewed_settled_cancelled_and_swept(full: Store) -> None:
    first, second = must_claim(full, lease_s=0.2), must_claim(full, lease_s=30)
    fill(full)

    assert full.renew(second) is False
    wait_for(lambda: full.sweep(30).expired == [("b.1", 1, first.nonce)], 5, "the sweep finds the expired lease")
    full.settle(first, Settlement(JobState.QUEUED, "lost", "silent", counts=True), only_expired=True)
    assert full.cancel(["b.1"])[0] == ["b.1"]
    full.settle(second, SUCCEEDED)
    assert states(full, "b.1", "b.2") == ["cancelled", "succeeded"]


# -- a server that does not answer


def calls(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: submit(store, new_job("b.1")),
        lambda: claim(store),
        lambda: store.batch("b"),
        lambda: store.jobs(["b.1"]),
        lambda: store.events("b.1", "0", 0.1),
        lambda: store.workers(),
        lambda: store.batch_names(),
        lambda: store.tokens("loraq.gpu8"),
        lambda: store.sweep(30),
    ]


def test_without_a_server_every_call_says_so_within_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        store = Store(f"redis://127.0.0.1:{port}/0")
        for call in calls(store):
            began = time.monotonic()
            with pytest.raises(ServerError, match=f"127.0.0.1:{port} does not answer"):
                call()
            assert time.monotonic() - began < 3


def test_a_stopped_server_is_given_up_within_seconds(restartable: RestartableServer) -> None:
    store = Store(restartable.url, timeout_s=0.2)
    submit(store, new_job("b.1"))
    running = must_claim(store)
    restartable.tell(signal.SIGSTOP)

    for call in [*calls(store), lambda: store.renew(running), lambda: store.settle(running, SUCCEEDED)]:
        began = time.monotonic()
        with pytest.raises(ServerError, match="does not answer"):
            call()
        assert time.monotonic() - began < 3

    restartable.tell(signal.SIGCONT)
    store.settle(running, SUCCEEDED)  # whether or not the one before has arrived
    assert states(store, "b.1") == ["succeeded"]


def test_a_call_that_reaches_the_server_after_its_client_gave_it_up_does_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(store, new_job("b.1"))
    before = snapshot(store.url)
    monkeypatch.setattr(store, "_not_after", lambda: int(time.time() * 1000) - 1)

    with pytest.raises(ServerError, match="too late; nothing was written"):
        submit(store, new_job("c.1"))
    assert claim(store) is None
    assert snapshot(store.url) == before


def test_the_store_goes_on_with_a_server_that_was_killed_and_came_back(restartable: RestartableServer) -> None:
    store = Store(restartable.url)
    submit(store, new_job("b.1"))
    restartable.restart()

    assert store.job("b.1").state is JobState.QUEUED
    assert submit(store, new_job("c.1")) == ["gpu8"]


@pytest.mark.parametrize("password", ["wrong", ""])
def test_a_wrong_password_is_called_that_and_not_shown(server: str, password: str) -> None:
    right = server.split(":")[2].split("@")[0]
    url = server.replace(f":{right}@", f":{password}@" if password else "")

    with pytest.raises(ServerError) as error:
        Store(url).batch_names()

    assert "refuses the login" in error.value.what
    assert "password" in error.value.do
    assert "wrong" not in error.value.what.replace("username-password pair", "")


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://host:port/0"])
def test_an_address_that_is_none_is_refused_with_what_one_looks_like(url: str) -> None:
    with pytest.raises(ServerError) as error:
        Store(url)

    assert "redis://" in error.value.do


# -- two at once


def test_of_two_processes_that_claim_at_the_same_moment_exactly_one_wins(store: Store) -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests")])
    with ExitStack() as stack:
        racers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", str(RACER), store.url, str(number)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": path},
                )
            )
            for number in range(2)
        ]
        for racer in racers:
            stack.callback(racer.kill)
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        winners = []
        for number in range(ROUNDS):
            submit(store, new_job(f"b{number}.1"))
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("go\n")
            for racer in racers:
                racer.stdin.flush()  # type: ignore[union-attr]
            answers = [racer.stdout.readline().strip() for racer in racers]  # type: ignore[union-attr]
            assert sorted(answers) == ["-", f"b{number}.1"]
            winners.append(answers.index(f"b{number}.1"))
        assert store.job("b0.1").attempt == 1
        assert len(set(winners)) == 2, "one process won each round: they never raced"


def test_of_two_submissions_of_one_name_exactly_one_is_taken(store: Store) -> None:
    def jobs(spec: str) -> list[NewJob]:
        return [new_job("b.1", spec={"of": spec}), new_job("b.2", spec={"of": spec})]

    answers = [submit(store, *jobs("one")), submit(Store(store.url), *jobs("two"))]

    assert answers == [["gpu8", "gpu8"], None]
    assert [job.spec["of"] for job in store.jobs(["b.1", "b.2"])] == ["one", "one"]


def test_a_client_loads_the_functions_that_a_flushed_server_lacks(store: Store) -> None:
    submit(store, new_job("b.1"))
    store._redis.function_flush()

    assert must_claim(store).job_id == "b.1"
