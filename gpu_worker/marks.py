"""Processes that are known by a mark in their environment, whatever their parent or session is by now."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

from gpu_worker import guardian

MARK = "LORAQ_TRAINER"  # in the environment of everything that a trainer starts
DAEMON = "LORAQ_DAEMON"  # in that of a GPU's MPS daemon and its servers
CACHE = "LORAQ_CACHE_DIR"
KILLED_S = 5.0  # how long a process may live after its SIGKILL, in the kernel's hands


def end_marked(mark: str, name: str = MARK) -> None:
    """SIGKILL to every process with that mark, until there is none."""
    give_up_at = time.monotonic() + KILLED_S
    while (left := marked(mark, name)) and time.monotonic() < give_up_at:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)


def marked(mark: str, name: str = MARK) -> list[psutil.Process]:
    """Every living process that carries that mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(name) == mark:
                found.append(process)
    return found


def mark_of(pid: int, cache: Path, name: str = MARK) -> str | None:
    """The mark of a process that a trainer (or, by that name, a daemon) of the worker with that cache is, or has
    started; None for any other."""
    with contextlib.suppress(psutil.Error, OSError):
        environment = psutil.Process(pid).environ()
        return environment.get(name) if environment.get(CACHE) == str(cache) else None
    return None


def end_leftovers(cache: Path) -> None:
    """Ends what an earlier life of the worker with that cache has left behind.

    A guardian ends everything below it, and a worker what a dead guardian has left; where both were killed at once, a
    child of the trainer in a session of its own, or an MPS server, is nobody's.
    """
    by_mark: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if environment.get(CACHE) == str(cache) and (mark := environment.get(MARK) or environment.get(DAEMON)):
                by_mark.setdefault(mark, []).append(process)
    for left in by_mark.values():
        if not any(_is_guardian(process) for process in left):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def _is_guardian(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and guardian.__file__ in process.cmdline()
    return False
