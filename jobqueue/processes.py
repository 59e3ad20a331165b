"""Processes that end with the one that started them, and files that only the user may read."""

from __future__ import annotations

import fcntl
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Runs before the program, in its process. Standard library only, no import of loraq: a few milliseconds.
# argv: how to end with the parent (prctl, watch), the parent's process id, the program and its arguments.
LAUNCHER = """\
import os, signal, sys
how, parent, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if how == "prctl":
    import ctypes
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the call
        os._exit(1)
elif os.fork() == 0:  # a watcher; standard input is a pipe that the parent holds
    import select
    program = os.getppid()
    os.closerange(3, 256)  # what the program inherits is not for the watcher to keep open
    while os.getppid() == program:
        if select.select([0], [], [], 0.5)[0]:
            os.kill(program, signal.SIGKILL)
            break
    os._exit(0)
os.execv(command[0], command)
"""


def start_process(
    command: Sequence[str],
    *,
    folder: Path,
    log: Path,
    die_with_parent: bool,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process in the background, in a session of its own: Ctrl-C in the terminal does not reach it.

    Args:
        command: the program, by its absolute path, and its arguments.
        folder: its working directory.
        log: where its output is appended.
        die_with_parent: the kernel, or a watcher where it cannot, kills it as soon as this process has ended.
        environment: this process's where it is None.
        pass_fds: descriptors that it inherits.
    """

    def popen(command: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
        with open(log, "ab") as output:
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=environment,
                pass_fds=pass_fds,
                start_new_session=True,
            )

    if not die_with_parent:
        return popen(command, subprocess.DEVNULL)
    how = "prctl" if sys.platform == "linux" else "watch"
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, how, str(os.getpid()), *command]
    # PDEATHSIG comes when the thread that started the child ends, not when the process does. So a thread that
    # stays until the child ends starts it, and reaps it.
    started: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()

    def keep() -> None:
        try:
            process = popen(launcher, subprocess.PIPE if how == "watch" else subprocess.DEVNULL)
        except OSError as error:
            started.put(error)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=keep, name=f"keeps {Path(command[0]).name}", daemon=True).start()
    process = started.get()
    if isinstance(process, OSError):
        raise process
    return process


def write_private(file: Path, text: str) -> None:
    """Replace the file at once; at no time may another user read it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def locked(descriptor: int, within_s: float) -> bool:
    """Takes the lock of an open file for this process alone; False: another one has it all that time.

    It lasts until the last copy of the descriptor is closed. Raises OSError where the file system has no locks.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.02)
