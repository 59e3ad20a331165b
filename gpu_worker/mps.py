"""NVIDIA's Multi-Process Service of one GPU: the kernels of several trainers run side by side, not in turns.

Its daemon starts a server, whose clients the trainers are. It belongs to this worker, under a guardian as a trainer
does: nothing of it outlives the worker. One that the operator runs, named by CUDA_MPS_PIPE_DIRECTORY, is used and left.

What NVIDIA documents of it, and what is done about it:
- A fatal fault of one client ends all of them, and the server takes no new one until all are gone. See `excuse`.
- A client that is killed in the middle of its work may harm the others: its contexts are ended first. See `part`.
- Clients that find no daemon run without it, in turns with the others. See `unsure`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

from gpu_worker import guardian
from gpu_worker.gpu import Device
from gpu_worker.marks import CACHE, DAEMON, KILLED_S, MARK, end_marked, marked
from gpu_worker.trainer_process import MPS_PIPES, TrainerProcess
from jobqueue.errors import MachineError

log = logging.getLogger(__name__)
CONTROL = "nvidia-cuda-mps-control"
LOGS = "CUDA_MPS_LOG_DIRECTORY"
LONGEST_PATH = 80  # characters of MPS_PIPES: below it are sockets, whose whole path may have 107
START_S, ASK_S, QUIT_S = 20.0, 5.0, 3.0
LOOK_S = 10.0  # how often the operator's daemon is asked whether it is there
WINDOW_S = 10.0  # within which clients of one server notice that it has failed under them
SETTLED_S = 1.0  # the daemon's end is known so long after its clients'
AGAIN_S = 60.0  # after a daemon could not be started again
OF_MPS = re.compile(r"\bMPS (client|server|control)")  # no connection, no place, terminated: CUDA's errors 805 to 810
OF_CUDA = re.compile(  # in the words of PyTorch, Triton and bitsandbytes
    r"CUDA (driver )?error|\[CUDA\]|cudaError|CUBLAS_STATUS|CUDNN_STATUS|illegal memory access|device-side assert"
    r"|unspecified launch failure"
)
SHARED = "another job's fault, or its own, took down the GPU's MPS server; it goes on in a context of its own"
ENDED = "the GPU's MPS daemon ended under it"


class Mps:
    """The daemon of one GPU, and the trainers that are its clients."""

    def __init__(self, device: Device, cache: Path, own: bool) -> None:
        self._device, self._cache, self._own = device, cache, own
        self._guardian: subprocess.Popen[bytes] | None = None
        self._mark = ""
        self._clients: list[TrainerProcess] = []
        self._changed = threading.Condition()
        self._failed_at = self._shared_at = 0.0  # a client, the last time; several together
        self._began_at = self._start_at = 0.0  # the daemon
        self._answered, self._look_at = True, 0.0
        folder = cache / "mps"
        if own and len(str(folder)) > LONGEST_PATH:
            folder = Path(tempfile.mkdtemp(prefix="loraq-mps-"))
        self._folder = folder
        self._pipes = str(folder) if own else os.environ[MPS_PIPES]

    # -- the daemon

    def start(self) -> None:
        """Raises MachineError where it does not answer in time."""
        if not self._own:
            if self._ask("get_server_list") is None:
                raise MachineError(
                    f"no MPS daemon answers in {self._pipes}",
                    f"Start it, or unset {MPS_PIPES}: a worker then runs one of its own.",
                )
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        logs = self._cache / "mps-log"
        logs.mkdir(parents=True, exist_ok=True)
        self._mark = uuid.uuid4().hex
        ours = {
            MPS_PIPES: self._pipes,
            LOGS: str(logs),
            # Its clients name the GPU by UUID too: an index would be one among those that the daemon sees.
            "CUDA_VISIBLE_DEVICES": self._device.uuid,
            DAEMON: self._mark,
            CACHE: str(self._cache),
        }
        none = [os.open(os.devnull, os.O_RDWR) for _ in range(2)]  # the request and the events of a trainer
        try:
            with (logs / "daemon.log").open("ab") as output:
                self._guardian = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-S", guardian.__file__),
                        *(str(QUIT_S), *map(str, none), CONTROL, "-f"),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=none,
                    env={**os.environ, **ours},
                    cwd=self._folder,
                    start_new_session=True,
                )
        finally:
            for descriptor in none:
                os.close(descriptor)
        give_up_at = time.monotonic() + START_S
        while self._ask("get_server_list") is None:
            if self._guardian.poll() is not None or time.monotonic() >= give_up_at:
                self.close()
                raise MachineError(
                    f"the MPS daemon of {self._device.label} does not start",
                    f"See {logs}, or work without it: loraq worker --share timeslice",
                )
            time.sleep(0.05)
        self._began_at = time.monotonic()
        log.info("the MPS daemon runs, its logs are in %s", logs)

    def close(self) -> None:
        """Ends the daemon and its servers, where they are the worker's own; nothing of them is left."""
        if self._guardian is None:
            return
        if self._guardian.poll() is None:
            self._ask("quit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guardian.wait(QUIT_S)
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guardian.stdin.close()  # the lifeline
        try:
            self._guardian.wait(KILLED_S)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        end_marked(self._mark, DAEMON)  # what a guardian that was killed has left
        self._guardian = None
        if self._folder.parent != self._cache:
            shutil.rmtree(self._folder, ignore_errors=True)

    def tend(self) -> None:
        """Starts a daemon that has ended again, once no client of it is left."""
        if self.alive() or not self._own or self._living() or time.monotonic() < self._start_at:
            return
        log.warning("the MPS daemon has ended; it is started again")
        self.close()
        try:
            self.start()
        except (MachineError, OSError) as error:
            log.warning("%s", error)
            self._start_at = time.monotonic() + AGAIN_S

    def alive(self) -> bool:
        """Whether there is a daemon; the operator's is asked now and then."""
        if self._own:
            return self._guardian is not None and self._guardian.poll() is None
        if time.monotonic() >= self._look_at:
            self._answered = self._ask("get_server_list") is not None
            self._look_at = time.monotonic() + LOOK_S
        return self._answered

    def _ask(self, command: str) -> str | None:
        """The daemon's answer to a command of its control program; None where there is none."""
        try:
            done = subprocess.run(
                [CONTROL],
                input=command + "\n",
                capture_output=True,
                text=True,
                timeout=ASK_S,
                env={**os.environ, MPS_PIPES: self._pipes},
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    # -- its clients

    @property
    def environment(self) -> dict[str, str]:
        """Of a trainer that is to be a client."""
        return {MPS_PIPES: self._pipes}

    @property
    def unsure(self) -> bool:
        """Whether a new client might not be taken: the daemon is gone, or clients from before a fault are left."""
        return not self.alive() or any(trainer.started_at < self._failed_at for trainer in self._living())

    def joined(self, trainer: TrainerProcess) -> None:
        with self._changed:
            self._clients = [*(one for one in self._clients if not one.ended), trainer]

    def _living(self) -> list[TrainerProcess]:
        return [trainer for trainer in self._clients if not trainer.ended]

    def part(self, mark: str) -> None:
        """Ends the contexts of a trainer that is about to be killed, whatever it does; the others go on."""
        servers = (self._ask("get_server_list") or "").split()
        for process in marked(mark, MARK):
            for server in servers:
                self._ask(f"terminate_client {server} {process.pid}")

    def doomed(self, trainer: TrainerProcess) -> str:
        """Why a client that still runs cannot go on; "" where it can."""
        if self._shared_at > trainer.started_at:
            return SHARED
        return "" if self._stands(trainer) else ENDED

    def _stands(self, trainer: TrainerProcess) -> bool:
        """Whether the daemon is there that the trainer began with."""
        return self.alive() and self._began_at <= trainer.started_at

    def excuse(self, trainer: TrainerProcess, last_words: str) -> str:
        """Why the job of a client that failed is not to blame; "" where it is.

        Which of several clients brought their server down nobody can tell. So none of their jobs pays, and each goes on
        in a context of its own, where the one that does it again pays alone. A client is excused where another one has
        failed in its lifetime, or does so within seconds; then the others cannot go on either.
        """
        if OF_MPS.search(last_words):
            return SHARED
        if not OF_CUDA.search(last_words):
            return "" if self._stands(trainer) else ENDED
        with self._changed:
            began, earlier = time.monotonic(), self._failed_at
            shared, self._failed_at = earlier > trainer.started_at, began
            self._changed.notify_all()
            while self._stands(trainer) and not shared and (waited := time.monotonic() - began) < WINDOW_S:
                others = any(one is not trainer and one.started_at < began for one in self._living())
                if not others and waited >= SETTLED_S:
                    break
                self._changed.wait(0.2)
                shared = self._failed_at > began
            if shared and (began - earlier < WINDOW_S or self._failed_at > began):
                self._shared_at = time.monotonic()
        return ENDED if not self._stands(trainer) else SHARED if shared else ""


def mps_of(device: Device, cache: Path, share: str, slots: int) -> Mps | None:
    """The running MPS of a GPU; None where its jobs take turns.

    Args:
        share: mps, timeslice, off, or auto: with MPS where several jobs may run and a daemon can be started.

    Raises MachineError where `mps` is wanted and cannot be had.
    """
    if device.kind != "gpu" or share in ("timeslice", "off") or (share == "auto" and slots == 1):
        return None
    try:
        if shutil.which(CONTROL) is None:
            raise MachineError(
                f"there is no {CONTROL}", "It comes with the NVIDIA driver; or: loraq worker --share timeslice"
            )
        found = Mps(device, cache, own=MPS_PIPES not in os.environ)
        found.start()
    except MachineError as error:
        if share == "mps":
            raise
        log.warning("jobs take turns on the GPU: %s", error.what)
        return None
    return found
