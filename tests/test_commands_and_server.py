"""The command line as its users start it, while its server is stopped, slow, full, a replica, or losing answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from helpers import RestartableServer, restartable_server, snapshot, wait_for
from proxy import Proxy, proxy

from jobqueue.service import Client
from jobqueue.settings import Settings

ROOT = Path(__file__).parents[1]
SERVER_ERROR = 5
ANSWER_S = 15.0  # within seconds, with Python's start, on a busy machine
ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}
SWEEP = {
    "name": "b", "base_model": "a/model-1B", "data": {"source": "rows.jsonl"}, "evaluation": {"source": "rows.jsonl"},
    "training": {"num_train_epochs": 1.0}, "resources": {"memory": "4GiB"}, "sweep": {"grid": {"lora.r": [8, 16]}},
}  # fmt: skip


class Shell:
    """`loraq` in a folder that has `sweep.yaml`; several commands may run at once."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        rows = (json.dumps({**ROW, "question": f"{number}?"}) + "\n" for number in range(200))  # none is unusual
        (folder / "rows.jsonl").write_text("".join(rows))
        (folder / "sweep.yaml").write_text(json.dumps(SWEEP))
        self.settings = Settings(redis_url=url, storage=str(folder / "storage"), data_dir=folder / "data", owner="ann")
        ours = {
            "LORAQ_REDIS_URL": url,
            "LORAQ_STORAGE": folder / "storage",
            "LORAQ_DATA_DIR": folder / "data",
            "LORAQ_CONFIG": os.devnull,
            "LORAQ_OWNER": "ann",
            "LORAQ_TIMEOUT_S": 1,
            "HF_HUB_OFFLINE": 1,
            "PYTHONPATH": ROOT,
        }
        self.environment = {**os.environ, **{name: str(value) for name, value in ours.items()}}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "cli.main", *words],
            env=self.environment, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str, list[str]]:
        return told(self.start(*words))


def told(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, standard output, lines of standard error."""
    out, err = process.communicate(timeout=ANSWER_S)
    return process.returncode, out, err.splitlines()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableServer]:
    with restartable_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def admin(server: RestartableServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def between(server: RestartableServer, admin: redis.Redis) -> Iterator[Proxy]:
    with proxy(server.port) as opened:
        yield opened


@pytest.fixture
def shell(tmp_path: Path, between: Proxy) -> Shell:
    return Shell(tmp_path, between.url)


def test_every_command_answers_within_seconds_while_the_server_is_stopped(
    shell: Shell, server: RestartableServer, admin: redis.Redis
) -> None:
    """celery#4296: submit hangs. What the stopped server finds in its sockets when it goes on is not carried out."""
    commands = ("submit sweep.yaml", "ls", "cancel b", "results b", "logs b.1", "workers")
    server.tell(signal.SIGSTOP)
    try:
        began = time.monotonic()
        running = {command: shell.start(*command.split()) for command in commands}
        for command, process in running.items():
            code, out, err = told(process)
            assert (code, out, len(err)) == (SERVER_ERROR, "", 2), (command, err)
            assert "does not answer" in err[0]
            assert "Check that the server runs" in err[1]
        assert time.monotonic() - began < ANSWER_S
    finally:
        server.tell(signal.SIGCONT)
    wait_for(admin.ping, 5, "the server goes on")
    assert snapshot(server.url) == {}

    assert shell.run("submit", "sweep.yaml")[0] == 0
    assert [batch.name for batch in Client(shell.settings).batches()] == ["b"]


def test_a_submit_whose_answer_is_lost_says_that_it_can_be_sent_again_and_then_is_one_batch(
    shell: Shell, between: Proxy
) -> None:
    between.lose_answer_to("submit_")
    code, out, err = shell.run("submit", "sweep.yaml")
    assert between.lost == 1
    assert (code, out, len(err)) == (SERVER_ERROR, "", 2)
    assert "does not answer" in err[0]
    assert "submit again: sent twice, it is one batch" in err[1]
    client = Client(shell.settings)
    before = client.batch("b")
    assert len(before.jobs) == 6, "it was accepted, and whole"

    code, _, err = shell.run("submit", "sweep.yaml")
    assert code == 0
    assert err[0].startswith("b is that already")
    assert client.batches() == [before]


def test_a_submit_that_a_stopped_server_finds_when_it_goes_on_writes_nothing(
    shell: Shell, between: Proxy, server: RestartableServer, admin: redis.Redis
) -> None:
    """The user has been told that it failed: it must not appear afterwards, nor may half of it."""
    between.before("submit_", lambda: server.tell(signal.SIGSTOP))
    try:
        code, out, err = shell.run("submit", "sweep.yaml")
    finally:
        server.tell(signal.SIGCONT)
    assert (code, out, len(err)) == (SERVER_ERROR, "", 2)
    wait_for(admin.ping, 5, "the server goes on")
    client = Client(shell.settings)
    assert client.batches() == []
    assert list(admin.scan_iter("*")) == []

    assert shell.run("submit", "sweep.yaml")[0] == 0
    assert [len(batch.jobs) for batch in client.batches()] == [6]


def test_a_submit_to_a_server_without_memory_fails_clearly_and_other_commands_answer(
    shell: Shell, admin: redis.Redis
) -> None:
    assert shell.run("submit", "sweep.yaml")[0] == 0
    admin.config_set("maxmemory", 1)
    try:
        code, out, err = shell.run("submit", "sweep.yaml", "--again")
        assert (code, out, len(err)) == (SERVER_ERROR, "", 2)
        assert "is at its memory limit; nothing was written" in err[0]
        assert "`loraq rm`" in err[1]
        assert shell.run("ls")[0] == 0
        assert shell.run("cancel", "b")[0] == 0
        assert shell.run("rm", "b")[0] == 0
    finally:
        admin.config_set("maxmemory", 0)


def test_what_is_set_wrong_on_the_server_is_said_by_submit_and_workers_and_refused_where_it_drops_jobs(
    shell: Shell, admin: redis.Redis
) -> None:
    admin.config_set("maxmemory-policy", "volatile-lru")
    admin.config_set("appendonly", "no")
    try:
        code, out, err = shell.run("submit", "sweep.yaml")
        assert code == 0
        assert "Submitted b" in out
        said = " ".join(" ".join(err).split())
        assert "set maxmemory-policy noeviction, not volatile-lru" in said
        assert "a restart of it loses jobs; set appendonly yes" in said
        assert "no append-only file" in " ".join(" ".join(shell.run("workers")[2]).split())

        admin.config_set("maxmemory-policy", "allkeys-lru")
        admin.config_set("maxmemory", "1gb")
        code, _, err = shell.run("submit", "sweep.yaml", "--again")
        assert code == SERVER_ERROR
        assert "drops jobs at its memory limit" in err[-2]
        assert "noeviction" in err[-1]
        assert [batch.name for batch in Client(shell.settings).batches()] == ["b"]
    finally:
        for name, value in {"maxmemory": 0, "maxmemory-policy": "noeviction", "appendonly": "yes"}.items():
            admin.config_set(name, value)


def test_a_replica_is_called_that(
    shell: Shell, between: Proxy, server: RestartableServer, admin: redis.Redis, tmp_path: Path
) -> None:
    """What a command meets that still points at the old primary after a failover."""
    admin.config_set("repl-diskless-sync-delay", 0)
    with restartable_server(tmp_path / "replica", "--replicaof", f"127.0.0.1 {server.port}") as replica:
        between.target = replica.port
        with redis.Redis.from_url(replica.url) as client:
            wait_for(lambda: client.info("replication")["master_link_status"] == "up", 30, "it follows")
        code, _, err = shell.run("submit", "sweep.yaml")
    assert code == SERVER_ERROR
    assert "is a replica" in err[-2]
    assert "LORAQ_REDIS_URL to the primary" in err[-1]
