"""The store when its server is full, stopped, locked or away, and when two workers ask at one moment."""

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
from unittest.mock import patch

import pytest
import redis
from helpers import (
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

ROUNDS = 60
RACER = Path(__file__).parent / "store_racer.py"


@pytest.fixture
def restartable(tmp_path: Path) -> Iterator[RestartableServer]:
    with restartable_server(tmp_path / "server") as server:
        yield server


# -- memory


@pytest.fixture
def full(redis_url: str) -> Iterator[Store]:
    """Two jobs of which one runs, on a server that has no memory left."""
    store = Store(redis_url)
    submit(store, new_job("b.1"), new_job("b.2"))
    store.sweep(0.05)
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
    wait_for(lambda: full.sweep(0.05).expired == [("b.1", 1, first.nonce)], 5, "the sweep finds the expired lease")
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

    for call in (
        lambda: submit(store, new_job("c.1")),
        lambda: store.ask(new_job("ask-1", batch="")),
        lambda: store.cancel(["b.1"]),
        lambda: store.release_base("b.1"),
        lambda: store.hold(["b.1"]),
        lambda: store.release(["b.1"]),
        lambda: store.retry(["b.1"]),
        lambda: store.mark("drained", "host", True),
        lambda: store.remove("b"),
    ):
        with pytest.raises(ServerError, match="too late; nothing was written"):
            call()
    assert claim(store) is None
    assert snapshot(store.url) == before


def test_a_cancel_that_was_given_up_is_not_carried_out_when_the_server_wakes(restartable: RestartableServer) -> None:
    store = Store(restartable.url, timeout_s=0.2)
    submit(store, new_job("b.1"))
    told = store._not_after
    stopped = patch.object(store, "_not_after", lambda: (told(), restartable.tell(signal.SIGSTOP))[0])
    with stopped, pytest.raises(ServerError, match="does not answer"):
        store.cancel(["b.1"])
    time.sleep(0.2)  # the client has given it up for good
    restartable.tell(signal.SIGCONT)

    wait_for(lambda: store._redis.ping(), 5, "the server answers")
    assert states(store, "b.1") == ["queued"]


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
