"""The worker of this machine as a process: whether it can be, its start, its record and its end."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jobqueue.errors import MachineError
from jobqueue.job import WorkerInfo
from jobqueue.memory import GIB
from jobqueue.processes import start_process, write_private
from jobqueue.settings import Settings

if TYPE_CHECKING:
    import psutil

    from jobqueue.service import Client

REGISTER_S = 90.0
"""How long a started worker may take until it is in the list of workers."""
DRAIN_S = 60.0
"""How long a worker may take to put its jobs back; then it is killed."""
LAST_LINES = 5

WORKER_MODULE = "gpu_worker.main"
CONTROL_PACKAGES = ("scipy", "statsmodels")
WORKER_PACKAGES = ("torch", "unsloth", "transformers", "trl")


@dataclass(frozen=True)
class WorkerProcess:
    """The worker that `loraq up` started."""

    pid: int
    server: str  # host:port/db that it works for
    log: str

    @property
    def alive(self) -> bool:
        return _process(self.pid) is not None

    def stop(self, deadline_s: float = DRAIN_S) -> bool:
        """End it and all its descendants; False where it had to be killed."""
        return stop_tree(self.pid, deadline_s)


def require_worker_extra() -> None:
    """Raises MachineError where what trains is not installed."""
    _require("worker", (*WORKER_PACKAGES, *CONTROL_PACKAGES), "a machine that only submits does not need it")


def require_control_extra() -> None:
    """Raises MachineError where what makes reports is not installed."""
    _require("control", CONTROL_PACKAGES, "reports are made with it")


def _require(extra: str, packages: tuple[str, ...], why: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MachineError(
            f"the {extra} extra is not installed ({', '.join(missing)} missing)",
            f"Install it with `pip install 'loraq[{extra}]'`; {why}.",
        )


def has_nvidia_gpu() -> bool:
    """Whether there is a GPU that a worker could use."""
    return bool(gpu_names())


def _gpu_name(index: int) -> str:
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return f"{pynvml.nvmlDeviceGetName(handle)}, {pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB:.0f} GiB"
    except pynvml.NVMLError as error:
        return f"GPU {index}, which does not answer ({error})"


def gpu_names() -> list[str]:
    """The GPUs that a worker could use, each with its memory."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        try:
            return [_gpu_name(index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []


def worker_command(options: Sequence[str]) -> list[str]:
    """-P: a folder of the user's that is called `cli` or `jobqueue` must not be taken for ours."""
    return [sys.executable, "-P", "-m", WORKER_MODULE, *options]


def worker_environment(settings: Settings, url: str) -> dict[str, str]:
    """This environment, with the settings in it: a password does not belong in a command line. They are all that
    counts: what the file or a profile says later is for the next start.
    """
    given = asdict(replace(settings, redis_url=url, storage=settings.storage_url, profile=None))
    values = {
        name: str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
        for name, value in given.items()
        if value is not None
    }
    others = {"LORAQ_CONFIG": os.devnull, "LORAQ_PROFILE": ""}
    return {**os.environ, **others, **{f"LORAQ_{name.upper()}": value for name, value in values.items()}}


def start_worker(
    settings: Settings, url: str, options: Sequence[str], *, die_with_parent: bool
) -> tuple[WorkerProcess, subprocess.Popen[bytes]]:
    """Start a worker in the background; its output goes to logs/worker.log in the data folder."""
    log = settings.data_dir / "logs" / "worker.log"
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = start_process(
        worker_command(options),
        folder=settings.data_dir,  # what libraries drop into the working directory lands there
        log=log,
        environment=worker_environment(settings, url),
        die_with_parent=die_with_parent,
    )
    return WorkerProcess(process.pid, server_name(url), str(log)), process


def server_name(url: str) -> str:
    """A server's URL without the password."""
    return url.rpartition("@")[2].partition("://")[2] or url.rpartition("@")[2]


def record_worker(settings: Settings, worker: WorkerProcess) -> None:
    write_private(_worker_file(settings), json.dumps(asdict(worker)))


def recorded_worker(settings: Settings) -> WorkerProcess | None:
    """The worker that was started in the background, if it still lives."""
    try:
        worker = WorkerProcess(**json.loads(_worker_file(settings).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return worker if worker.alive else None


def forget_worker(settings: Settings) -> None:
    _worker_file(settings).unlink(missing_ok=True)


def _worker_file(settings: Settings) -> Path:
    return settings.data_dir / "worker.json"


def wait_until_registered(
    client: Client, process: subprocess.Popen[bytes], log: Path, before: dict[str, float]
) -> list[WorkerInfo]:
    """The workers of this machine, as soon as one that trains has reported itself.

    Args:
        before: uid -> seen_at of the workers that were known before this one was started.

    Raises:
        MachineError: it ended, or is still not there at the deadline.
    """
    deadline = time.monotonic() + REGISTER_S
    host = socket.gethostname()
    while time.monotonic() < deadline:
        here = [w for w in client.workers() if w.host == host and w.seen_at > before.get(w.uid, 0)]
        if any(w.trains for w in here):
            return here
        if process.poll() is not None:
            raise MachineError(f"the worker ended at its start: {last_lines(log)}", f"Its log is {log}.")
        time.sleep(0.2)
    raise MachineError(
        f"the worker does not report itself within {REGISTER_S:.0f} s: {last_lines(log)}",
        f"Its log is {log}.",
    )


def seen(client: Client) -> dict[str, float]:
    """When each worker that the server knows was seen last."""
    return {worker.uid: worker.seen_at for worker in client.workers()}


def last_lines(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "it has printed nothing"
    return "\n".join(lines[-LAST_LINES:]) or "it has printed nothing"


def stop_tree(pid: int, deadline_s: float) -> bool:
    """SIGTERM to a worker; when it has ended, or at the deadline, SIGKILL to what is left of its descendants.

    False where the worker itself had to be killed.
    """
    import psutil

    process = _process(pid)
    if process is None:
        return True
    descendants: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
    orderly = _until(lambda: _gone(process, descendants), deadline_s)
    left = {p for p in (process, *descendants) if not _gone(p, set())}
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    _until(lambda: all(_gone(one, set()) for one in left), 5)
    return orderly


def _gone(process: psutil.Process, descendants: set[psutil.Process]) -> bool:
    """Whether it has ended; while it has not, its `descendants` are added."""
    import psutil

    try:
        descendants.update(process.children(recursive=True))
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _until(condition: Callable[[], bool], deadline_s: float) -> bool:
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _process(pid: int) -> psutil.Process | None:
    """The process, if it is a worker: its number may belong to another program by now."""
    import psutil

    try:
        process = psutil.Process(pid)
        is_worker = WORKER_MODULE in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if is_worker else None
