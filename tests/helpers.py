"""What several suites use: waiting with a deadline, jobs made by hand, a server that can be killed and come back."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import redis

from jobqueue.embedded import server_binary
from jobqueue.job import Claim, JobState
from jobqueue.memory import GIB
from jobqueue.processes import start_process
from jobqueue.store import NewJob, Settlement, Store

T = TypeVar("T")
LEASE_S = 30.0
SUCCEEDED = Settlement(JobState.SUCCEEDED, outcome={"ok": True})
AGAIN = Settlement(JobState.QUEUED, "crashed", "it broke", counts=True)


def wait_for(condition: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value of `condition`; fails the test with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def new_job(job_id: str, **changes: Any) -> NewJob:
    """A train job of 1 GiB in the class gpu8; `spec` may be a dict."""
    fields: dict[str, Any] = {
        "kind": "train", "batch": job_id.partition(".")[0], "trial": "", "owner": "ann", "spec": {"kind": "train"},
        "device": "auto", "priority": 0, "queue": "gpu8", "need": GIB, "needs": (), "follows": (),
    }  # fmt: skip
    fields |= changes
    if not isinstance(fields["spec"], str):
        fields["spec"] = json.dumps(fields["spec"])
    return NewJob(id=job_id, **fields)


def submit(store: Store, *jobs: NewJob) -> list[str] | None:
    """A batch of these jobs, named as the first of them says; the classes to wake, None where the name is taken."""
    name = jobs[0].id.partition(".")[0]
    made = store.submit(name, jobs[0].owner, 1, "a/model", jobs, [job.id for job in jobs])
    return None if made is None else list(made.classes)


def claim(store: Store, worker: str = "host/gpu0", device: str = "gpu", **changes: Any) -> Claim | None:
    """A claim as a worker makes it; `free` in bytes, `lease_s`, `queues`."""
    queues = changes.get("queues", ["control"] if device == "control" else ["gpu8", "gpu16"])
    free = changes.get("free", 100 * GIB)
    return store.claim(worker, device, free, changes.get("lease_s", LEASE_S), secrets.token_hex(8), queues)


def must_claim(store: Store, worker: str = "host/gpu0", device: str = "gpu", **changes: Any) -> Claim:
    found = claim(store, worker, device, **changes)
    assert found is not None, "there was nothing to claim"
    return found


def states(store: Store, *ids: str) -> list[str]:
    return [job.state.value for job in store.jobs(ids)]


def snapshot(url: str) -> dict[str, bytes]:
    """Every key of loraq with its content, for `nothing was written`."""
    with redis.Redis.from_url(url) as client:
        keys = sorted(key.decode() for key in client.scan_iter("{loraq}:*"))
        return {key: client.dump(key) or b"" for key in keys}  # type: ignore[misc]


def preload(folder: Path, source: str) -> Path:
    """C code as a library for LD_PRELOAD: what a server gets from the kernel, as a test wants it."""
    (folder / "preload.c").write_text(source)
    library = folder / "preload.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, folder / "preload.c"], check=True)
    return library


class RestartableServer:
    """A server on a port of its own that keeps what it knows over kill -9; ends with this process."""

    def __init__(self, folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self._options, self._environment = folder, options, environment
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly yes --appendfsync always --save".split()
        self._process = start_process(
            [
                *(str(server_binary()), *options, "", "--dir", str(self.folder)),
                *("--maxmemory-policy", "noeviction", *self._options),
            ],
            folder=self.folder,
            log=self.folder / "valkey.log",
            die_with_parent=True,
            environment=self._environment,
        )
        wait_for(self._answers, 20, "the server answers")

    def _answers(self) -> bool:
        with redis.Redis.from_url(self.url, socket_timeout=1) as client, contextlib.suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def tell(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Does nothing where it has ended already."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.tell(signal.SIGCONT)
                self.tell(number)
            process = self._process
            wait_for(lambda: process.poll() is not None, 10, "the server has ended")

    def restart(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.end(number)
        self.start()


@contextlib.contextmanager
def restartable_server(
    folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[RestartableServer]:
    server = RestartableServer(folder, *options, environment=environment)
    server.start()
    try:
        yield server
    finally:
        server.end()
