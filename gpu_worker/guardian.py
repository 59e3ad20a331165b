"""The parent of a trainer: ends it, and all that it started, when its time is up or its worker is gone.

    python -P -S guardian.py GRACE_S REQUEST_FD EVENTS_FD COMMAND...

Standard library only, so that it starts in milliseconds and holds no memory. Standard input is the lifeline to the
worker, one line at a time:

    deadline SECONDS    on the clock that counts sleep; `inf` between two jobs
    checkpoint          SIGUSR1 to the trainer: save what there is
    stop                SIGTERM to the trainer, GRACE_S later SIGKILL to everything

At half of the time to a deadline the trainer is asked for a checkpoint too: the renewal is overdue by then.
At the end of file (the worker is dead) and at the deadline (the worker could not renew the job's lease) everything is
killed at once: whoever claims the job next must find no one else at work on it. The guardian is a session leader and a
subreaper, so that children which left the session are still its own. What they leave in the folder for temporary files,
which is theirs alone, goes when they are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Seconds on a clock that goes on while the machine sleeps."""
    return time.clock_gettime(CLOCK)


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with(parent: int) -> None:
    """In the child, between fork and exec: SIGKILL when the guardian dies, also if it died just now."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def descendants(root: int) -> list[int]:
    """Every process below `root`, by the kernel's list of children."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def kill_all() -> None:
    """SIGKILL to every descendant, until there is none."""
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


class Lifeline:
    """What the worker last said."""

    def __init__(self) -> None:
        self.deadline = self.half = math.inf
        self.checkpoint = self.stop = False
        self.open = True
        self._rest = b""

    def listen(self, seconds: float) -> None:
        if not select.select([0], [], [], seconds)[0]:
            return
        data = os.read(0, 4096)
        self.open = bool(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, value = line.partition(b" ")
            if word == b"deadline":
                self.deadline = float(value)
                self.half = (now() + self.deadline) / 2
            self.checkpoint = self.checkpoint or word == b"checkpoint"
            self.stop = self.stop or word == b"stop"


def main() -> int:
    grace_s, request_fd, events_fd, *command = sys.argv[1:]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worker decides, by the lifeline
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    me = os.getpid()

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # lasts over exec: no trainer that still starts dies of it
        die_with(me)

    temporary = tempfile.mkdtemp(prefix="loraq-trainer-")
    trainer = subprocess.Popen(
        command,
        stdin=int(request_fd),
        pass_fds=[int(events_fd)],
        env={**os.environ, "TMPDIR": temporary},
        preexec_fn=in_child,
    )
    os.close(int(request_fd))
    os.close(int(events_fd))  # so that the worker sees the end of file when the trainer ends
    lifeline, kill_at = Lifeline(), math.inf
    while trainer.poll() is None:
        lifeline.listen(0.05)
        if lifeline.checkpoint or now() >= lifeline.half:
            lifeline.checkpoint, lifeline.half = False, math.inf
            trainer.send_signal(signal.SIGUSR1)
        if lifeline.stop and kill_at == math.inf:
            kill_at = now() + float(grace_s)
            trainer.terminate()
        if not lifeline.open or now() >= min(lifeline.deadline, kill_at):
            break
    kill_all()
    shutil.rmtree(temporary, ignore_errors=True)
    code = trainer.returncode if trainer.returncode is not None else -signal.SIGKILL
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
