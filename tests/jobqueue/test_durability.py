"""A submit is confirmed when the server's disk has it, and a server that would drop jobs is not trusted with any."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from helpers import (
    RestartableServer,
    claim,
    must_claim,
    new_job,
    preload,
    restartable_server,
    snapshot,
    states,
    submit,
    wait_for,
)

from jobqueue.broker import make_app
from jobqueue.durability import EVERY_S, look
from jobqueue.errors import ServerError
from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.store import Store
from jobqueue.sweeper import Sweeper

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableServer]:
    with restartable_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running: RestartableServer) -> Iterator[redis.Redis]:
    """The server's own client; what a test sets is set back."""
    with redis.Redis.from_url(running.url, decode_responses=True) as client:
        client.flushall()
        yield client
        for name, value in {"appendfsync": "always", "maxmemory": 0, "maxmemory-policy": "noeviction"}.items():
            client.config_set(name, value)


@pytest.fixture
def store(running: RestartableServer, server: redis.Redis) -> Iterator[Store]:
    opened = Store(running.url)
    yield opened
    opened.close()


@pytest.fixture
def client(running: RestartableServer, server: redis.Redis, tmp_path: Path) -> Client:
    settings = Settings(redis_url=running.url, storage=str(tmp_path / "storage"), data_dir=tmp_path, owner="ann")
    return Client(settings)


def send(client: Client, folder: Path) -> str:
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    sweep = {"name": "b", "base_model": "a/model-1B", "data": {"source": "rows.jsonl"}, "resources": {"memory": "4GiB"}}
    (folder / "sweep.yaml").write_text(json.dumps(sweep))
    return client.submit(client.plan(client.read(folder / "sweep.yaml"))).name


def made(store: Store, name: str, key: str = "") -> bool:
    done = store.submit(name, "ann", 1, "a/model", [new_job(f"{name}.1")], [f"{name}.1"], key)
    assert done is not None
    return done.on_disk


# -- whether it is on disk


SLOW_DISK = """\
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static void note(const char *what) {
    int file = open(getenv("DISK_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    write(file, what, 1);
    close(file);
}

int fdatasync(int file) {
    note("b");
    while (access(getenv("DISK_HELD"), F_OK) == 0) usleep(5000);
    int answer = syscall(SYS_fdatasync, file);
    note("e");
    return answer;
}
"""


class Disk:
    """Of a server whose disk can be held up, and which writes down when it begins, and ends, to write a file out."""

    def __init__(self, folder: Path) -> None:
        self._log, self._held = folder / "log", folder / "held"
        self._log.touch()
        library = preload(folder, SLOW_DISK)
        ours = {"LD_PRELOAD": str(library), "DISK_LOG": str(self._log), "DISK_HELD": str(self._held)}
        self.environment = {**os.environ, **ours}

    @property
    def done(self) -> str:
        return self._log.read_text()

    @contextmanager
    def held_up(self) -> Iterator[None]:
        self._held.touch()
        try:
            yield
        finally:
            self._held.unlink()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def slow(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableServer]:
    """A server that writes its file out every second, to that disk."""
    folder = tmp_path_factory.mktemp("slow")
    with restartable_server(folder, "--appendfsync", "everysec", environment=disk.environment) as server:
        yield server


def test_a_submit_is_confirmed_after_a_whole_writing_out_that_began_after_it(
    slow: RestartableServer, disk: Disk
) -> None:
    for name, timeout_s in (("b", 5), ("c", 0.3)):
        store = Store(slow.url, timeout_s=timeout_s)
        before = len(disk.done)
        assert made(store, name)
        since = disk.done[before:]
        assert "e" in since[since.index("b") :], "what was under way before does not hold it"


def test_a_submit_that_the_disk_does_not_take_in_time_is_accepted_not_confirmed_and_confirmed_when_sent_again(
    slow: RestartableServer, disk: Disk
) -> None:
    store = Store(slow.url, timeout_s=2.5)
    with disk.held_up():
        began = time.monotonic()
        assert not made(store, "d", "key")
        assert time.monotonic() - began < 4
        assert states(store, "d.1") == ["queued"]

    assert made(store, "d", "key"), "whatever was under way"
    assert store.job("d.1").attempt == 0


def test_the_user_is_told_that_a_batch_is_accepted_and_not_yet_on_disk(
    client: Client, server: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobqueue.store.wait_until_on_disk", lambda connection, seconds: False)
    with pytest.raises(ServerError) as error:
        send(client, tmp_path)
    assert "b is accepted, but Redis at 127.0.0.1" in error.value.what
    assert "submit again: sent twice, it is one batch" in error.value.do

    monkeypatch.undo()
    assert send(client, tmp_path) == "b"
    assert [batch.name for batch in client.batches()] == ["b"]


def test_a_server_that_stops_after_it_has_accepted_is_not_waited_for_beyond_the_time_of_a_call(
    slow: RestartableServer,
) -> None:
    store = Store(slow.url, timeout_s=1.5)
    stopping = threading.Timer(0.5, slow.tell, [signal.SIGSTOP])
    stopping.start()
    began = time.monotonic()
    try:
        assert not made(store, "s")
        assert time.monotonic() - began < 5
    finally:
        slow.tell(signal.SIGCONT)
    assert states(store, "s.1") == ["queued"]


@pytest.mark.parametrize("told", [{"appendfsync": "no"}, {"appendonly": "no"}])
def test_a_server_that_does_not_wait_for_its_disk_is_not_waited_for_and_warned_of(
    slow: RestartableServer, told: dict[str, str]
) -> None:
    store = Store(slow.url)
    with redis.Redis.from_url(slow.url) as server:
        before = {name: server.config_get(name)[name] for name in told}
        for name, value in told.items():
            server.config_set(name, value)
        try:
            began = time.monotonic()
            assert made(store, f"n-{next(iter(told))}")
            assert time.monotonic() - began < EVERY_S
            [warning] = store.keeping().warnings
        finally:
            for name, value in before.items():
                server.config_set(name, value)
    assert "loses jobs; set append" in warning


# -- what it drops


def test_a_server_that_drops_any_key_at_its_limit_gets_no_job(
    client: Client, server: redis.Redis, tmp_path: Path
) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    [warning] = client.warnings()
    assert "set maxmemory-policy noeviction, not allkeys-lru" in warning

    server.config_set("maxmemory", "1gb")
    with pytest.raises(ServerError) as error:
        send(client, tmp_path)

    assert "drops jobs at its memory limit (maxmemory-policy allkeys-lru); nothing was submitted" in error.value.what
    assert "noeviction" in error.value.do
    assert snapshot(client.store.url) == {}


def test_the_control_worker_says_once_what_is_set_wrong_and_again_when_something_else_is(
    store: Store, client: Client, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    sweeper = Sweeper(store, make_app(store.url, 5), client.settings)

    def said() -> list[str]:
        caplog.clear()
        for _ in range(2):
            sweeper._look_at = 0
            sweeper.look_at_server()
        return [record.getMessage() for record in caplog.records]

    assert said() == []
    server.config_set("maxmemory-policy", "allkeys-lfu")
    [line] = said()
    assert line.endswith("may drop keys at its memory limit: set maxmemory-policy noeviction, not allkeys-lfu")
    server.config_set("appendfsync", "no")
    [line] = said()
    assert line.endswith("a power cut loses jobs; set appendfsync everysec, not no")


def test_a_policy_that_spares_what_does_not_expire_is_warned_of_and_drops_no_record(
    client: Client, server: redis.Redis, tmp_path: Path
) -> None:
    server.config_set("maxmemory-policy", "volatile-lru")
    server.config_set("maxmemory", "1gb")

    assert send(client, tmp_path) == "b"
    assert "not volatile-lru" in client.warnings()[0]
    assert [server.ttl(key) for key in server.scan_iter("*")] == [-1] * server.dbsize()


def test_a_managed_server_that_refuses_config_and_waitaof_works_all_the_same(
    running: RestartableServer, server: redis.Redis
) -> None:
    server.execute_command(
        *"ACL SETUSER managed on >secret ~* &* +@all -config -waitaof -debug -shutdown".split()  # noqa: SIM905
    )
    server.config_set("maxmemory-policy", "volatile-ttl")
    store = Store(running.url.replace("redis://", "redis://managed:secret@"))

    assert "not volatile-ttl" in store.keeping().warnings[0], "INFO says so"
    began = time.monotonic()
    assert made(store, "b")
    assert time.monotonic() - began > EVERY_S, "it may write out every second only"


def test_a_server_that_does_not_say_how_it_keeps_jobs_is_warned_of(
    running: RestartableServer, server: redis.Redis
) -> None:
    server.execute_command(*"ACL SETUSER silent on >secret ~* &* +@all -info -config".split())  # noqa: SIM905
    with redis.Redis.from_url(running.url, username="silent", password="secret", decode_responses=True) as silent:
        assert "INFO is not permitted" in look(silent).warnings[0]


def test_what_was_evicted_all_the_same_keeps_nobody_from_the_rest(store: Store) -> None:
    """19 of 20 queued jobs were dropped by allkeys-lru; a claim must not break on what is left of them in indexes."""
    submit(store, *(new_job(f"b.{number}") for number in range(1, 21)))
    must_claim(store, lease_s=0.1)
    for number in range(1, 20):
        store._redis.delete(f"{{loraq}}:job:b.{number}")

    found = wait_for(lambda: claim(store, lease_s=0.1), 5, "the one that is left is claimed")
    assert found.job_id == "b.20"

    def swept() -> bool:
        store.sweep(0.05)
        return store._redis.zrange("{loraq}:running", 0, -1) == ["b.20"]

    wait_for(swept, 5, "what is gone does not run either")
    assert store.batch("b").states == {"running": 1}
