"""A host as the chaos driver sees it: a worker with a name, a data folder and a way to the storage of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from helpers import wait_for
from proxy import Proxy

from gpu_worker.marks import MARK

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests" / "stub_trainer.py"
ANY_TRAINER = ROOT / "tests" / "chaos" / "any_trainer.py"
SLOW = ROOT / "tests" / "slow_fs"
LEASE_S = 6.0
GRACE_S = 0.5
STORAGE_TIMEOUT_S = 8.0  # much longer than anything here takes, on a busy machine as well

# Becomes the worker, under a host name that nobody else sees. Without the right to that, all hosts have one name, and a
# fault on one of them explains what happened on another. It ends with the driver, however that ends.
LAUNCHER = """\
import ctypes, os, signal, socket, sys
CLONE_NEWUTS, PR_SET_PDEATHSIG = 0x04000000, 1
libc = ctypes.CDLL(None)
libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if libc.unshare(CLONE_NEWUTS) == 0:
    socket.sethostname(sys.argv[1])
os.execv(sys.argv[2], sys.argv[2:])
"""


class Disk:
    """A file system of its own below the storage of all hosts, so that it can be full. Needs root and mounts."""

    SIZE = "2g"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.SIZE}", "tmpfs", str(folder)], check=True)

    def fill(self) -> bool:
        """Nothing more fits; False where somebody has just written too much for that."""
        used = os.statvfs(self._folder)
        size = (used.f_blocks - used.f_bfree) * used.f_frsize
        return self._resize(str(max(4096, size)))

    def empty(self) -> None:
        assert self._resize(self.SIZE)

    def _resize(self, size: str) -> bool:
        command = ["mount", "-o", f"remount,size={size}", str(self._folder)]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)


class Host:
    """One `loraq worker --cpu`, started again and again.

    Args:
        name: as a host's.
        folder: of all hosts.
        url: of the server.
        inside: a command by way of which it is started.
        options: of the worker, behind `--cpu`.
        trainer: the file that it starts as a trainer.
        proxy: between it and the server, where there is one; `url` is the proxy's then.
        may_hang: its storage is one that can hang, see tests/slow_fs.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        url: str,
        inside: Sequence[str] = (),
        *,
        options: Sequence[str] = (),
        trainer: Path = STUB,
        proxy: Proxy | None = None,
        may_hang: bool = False,
    ) -> None:
        self.name, self._url, self._inside = name, url, inside
        self._options, self._trainer, self.proxy, self.may_hang = options, trainer, proxy, may_hang
        self.folder = folder / name
        self.beats = folder / "beats"
        self.shared = folder / "storage"
        self.storage = self.folder / "storage"  # a link, as a mount is
        self.log = self.folder / "worker.log"
        self.data = self.folder / "data"
        for made in (self.folder, self.beats, self.shared):
            made.mkdir(parents=True, exist_ok=True)
        (self.folder / "a-file").write_text("where the storage should be")
        self.mount()
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    # -- the storage

    def _point(self, target: Path) -> None:
        new = self.folder / "storage.new"
        new.symlink_to(target)
        new.replace(self.storage)

    def mount(self) -> None:
        self._point(self.shared)

    def unmount(self) -> None:
        """What is there is a file: nothing can be read or written below it."""
        self._point(self.folder / "a-file")

    # -- its processes

    def environment(self) -> dict[str, str]:
        ours = {
            "LORAQ_REDIS_URL": self._url,
            "LORAQ_STORAGE": f"slow://{self.storage}" if self.may_hang else self.storage,
            "LORAQ_DATA_DIR": self.data,
            "LORAQ_CONFIG": os.devnull,
            "LORAQ_TRAINER_COMMAND": json.dumps([sys.executable, str(self._trainer)]),
            "LORAQ_BEATS": self.beats,
            "LORAQ_LEASE_S": LEASE_S,
            "LORAQ_RENEW_S": 0.5,
            "LORAQ_POLL_S": 0.5,
            "LORAQ_SWEEP_S": 0.5,
            "LORAQ_GRACE_S": GRACE_S,
            "LORAQ_STORAGE_TIMEOUT_S": STORAGE_TIMEOUT_S,
            "LORAQ_MAX_FAILURES": 50,  # the caps of jobqueue/retry.py hold all the same
            "PYTHONPATH": os.pathsep.join([str(SLOW), str(ROOT)] if self.may_hang else [str(ROOT)]),
        }
        return {**os.environ, **{name: str(value) for name, value in ours.items()}}

    def start(self) -> None:
        self._started_at = time.monotonic()
        worker = [sys.executable, "-P", "-m", "gpu_worker.main", "--cpu", *self._options]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._inside, sys.executable, "-I", "-S", "-c", LAUNCHER, self.name, *worker],
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def ended_well(self) -> bool:
        """By itself; or by SIGTERM before it could listen to that: there was nothing to drain yet."""
        early = time.monotonic() - self._started_at < 5 and self.exit_code == -signal.SIGTERM
        return self.exit_code == 0 or early

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def tell(self, number: signal.Signals) -> None:
        """To the supervisor."""
        assert self._process is not None
        if self.runs:
            self._process.send_signal(number)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Living processes below the supervisor, those with `word` in an argument."""
        if not self.runs:
            return []
        assert self._process is not None
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(word in argument for argument in process.cmdline()):
                        found.append(process)
        return found

    def celery(self, kind: str) -> list[psutil.Process]:
        """The process that serves `cpu` or `control`."""
        served = self.processes("gpu_worker.serve")
        return [process for process in served if _argument_after(process, "--kind") == kind]

    def trainers(self) -> list[psutil.Process]:
        return [process for process in self.processes(self._trainer.name) if "guardian.py" not in _command(process)]

    def left(self, *, trainers_only: bool = False) -> list[psutil.Process]:
        """Every living process that was started here, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                wanted = MARK in environment or not trainers_only
                ours = environment.get("LORAQ_DATA_DIR") == str(self.data)
                if ours and wanted and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def close(self) -> None:
        """Whatever happened before: nothing of it stays."""
        self.tell(signal.SIGKILL)
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        wait_for(lambda: not self.left(), 10, f"everything of {self.name} has ended")


def alive(processes: list[psutil.Process]) -> list[str]:
    """The commands of those that live; a zombie that nobody has collected yet does not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline()[:6])}")
    return found


def beating(beats: Path) -> set[int]:
    """The trainers that have done a step just now."""
    found = set()
    for file in beats.iterdir():
        if time.time() - file.stat().st_mtime < 0.3:
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - 60))
                *_, whole, _ = [b"", *opened.read().split(b"\n")]
            found |= {int(word) for word in whole.split()[:1]}
    return found


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _argument_after(process: psutil.Process, option: str) -> str:
    words = _command(process).split()
    return words[words.index(option) + 1] if option in words[:-1] else ""
