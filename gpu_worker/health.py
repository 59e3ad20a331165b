"""Whether a card can be trusted with a job, and how much of it is free for ours. Pure rules: `Health.after`.

A card is sick after an Xid that is the card's fault, after an ECC error that could not be corrected, where the driver
wants it reset, and where it does not answer. Memory that other processes hold makes it smaller, not sick.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil

from gpu_worker.gpu import Card, CardError, Device, Load, Reading, machine_load, main_memory_bytes, usable
from gpu_worker.marks import DAEMON, mark_of
from jobqueue.memory import GIB

log = logging.getLogger(__name__)
LOOK_S = 2.0
RESET_LOOK_S = 15.0  # while a reset is waited for: each look keeps the card open for a moment
QUIET_S = 300.0  # how long a card rests after an error that needs no reset
ASKED_S = 5.0  # how long somebody waits for a look
SILENT_S = 30.0  # a look that takes longer hangs in the driver
FAINT_S = 10.0  # an error of NVML's that may pass is not held against running jobs for so long
WORTH_SAYING = GIB  # less than this, a desktop holds

# Xids that stop a card, by NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors), and what they are.
NEEDS_RESET: Mapping[int, str] = {
    46: "GPU stopped processing",
    48: "double bit ECC error",
    62: "internal micro-controller halt",
    64: "row remapper or page retirement failure",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "GSP does not answer",
    120: "GSP error",
    140: "unrecovered ECC error",
    143: "GPU initialisation failure",
}
# The fault of a program, or mere notes: the card does well. 154 says that `Reading.recovery` has changed.
NO_FAULT_OF_THE_CARD = frozenset({8, 11, 13, 31, 32, 37, 43, 45, 63, 68, 69, 92, 94, 109, 137, 154})
# Any other: it rests for QUIET_S.


@dataclass(frozen=True)
class Ours:
    """What of a reading belongs to this worker's trainers."""

    held: Mapping[int, int]  # process id -> bytes
    alive: bool  # there are trainers, whether NVML names them or not
    daemons: Collection[int] = ()  # process ids of what serves them, whose memory no job can have


NOBODY = Ours({}, False)


@dataclass(frozen=True)
class Health:
    """What is known of a card."""

    usable_bytes: int = 0
    sick: str = ""  # why it takes no job
    ends_jobs: bool = False  # and why those that run on it cannot go on either
    total_bytes: int = 0
    foreign: str = ""  # who else holds how much of it, where that is worth saying
    foreign_bytes: int = 0  # and how much that is
    needs_reset: str = ""  # what has happened, where only a reset ends it
    rests_until: float = 0.0  # seconds since the epoch
    rests: str = ""
    uncorrected: int | None = None
    silent_since: float = 0.0
    lost: bool = False  # it was, at the last look

    @property
    def note(self) -> str:
        """For the list of workers."""
        return f"sick: {self.sick}" if self.sick else self.foreign

    def is_news_after(self, said: Health) -> bool:
        """Whether it is worth a line in the log: who holds a little more or less every second is not."""
        if self.sick or said.sick:
            return self.sick != said.sick
        return self.foreign_bytes > 2 * said.foreign_bytes or (not self.foreign and bool(said.foreign))

    def after(self, seen: Reading | CardError, ours: Ours, now: float) -> Health:
        """What is known after one more look, at `now` seconds since the epoch."""
        if isinstance(seen, CardError):
            return self._without_answer(seen, now)
        # Whatever brought a lost card back was a reset.
        reset = self.lost or bool(self.uncorrected and not seen.uncorrected)  # which begins the count again
        health = replace(self, needs_reset="", rests_until=0.0) if reset else self
        health = replace(health, silent_since=0.0, lost=False, uncorrected=seen.uncorrected)
        for xid in seen.xids:
            health = health._with_xid(xid, now)
        if seen.uncorrected > (self.uncorrected or 0) and (self.uncorrected is not None or seen.recovery is None):
            what = f"ECC error that could not be corrected, at {_clock(now)}"
            health = replace(health, needs_reset=health.needs_reset or what, rests_until=now + QUIET_S, rests=what)
        if seen.recovery is not None:  # the driver's word goes before our table
            health = replace(health, needs_reset=seen.recovery and (health.needs_reset or "the driver reports a fault"))
        sick = f"{health.rests}; it rests until {_clock(health.rests_until)}" if now < health.rests_until else ""
        if health.needs_reset:
            sick = f"{health.needs_reset}; it needs {seen.recovery or 'a reset'}"
        return replace(health, sick=sick, ends_jobs=bool(health.needs_reset), **_memory(self, seen, ours))

    def _without_answer(self, error: CardError, now: float) -> Health:
        since = self.silent_since or now
        ends = self.ends_jobs or error.lost or now - since >= FAINT_S
        sick = f"it does not answer since {_clock(since)}: {error}"
        return replace(self, sick=sick, ends_jobs=ends, silent_since=since, lost=self.lost or error.lost)

    def _with_xid(self, xid: int, now: float) -> Health:
        if xid in NO_FAULT_OF_THE_CARD:
            return self
        what = f"Xid {xid} at {_clock(now)}"
        if xid in NEEDS_RESET:
            return replace(self, needs_reset=f"{what}, {NEEDS_RESET[xid]}", rests_until=now + QUIET_S, rests=what)
        return replace(self, rests=what, rests_until=now + QUIET_S)


def _clock(at: float) -> str:
    return time.strftime("%H:%M", time.localtime(at))


def _memory(before: Health, seen: Reading, ours: Ours) -> dict[str, Any]:
    """What is ours and what is not. In a container NVML names no process: memory that nobody is named for may be our
    trainers' while there are any, and what was known before stands."""
    mine = sum(ours.held.values())
    used = seen.total_bytes - seen.reserved_bytes - seen.free_bytes
    if ours.alive and not mine and used - sum(seen.held.values()) >= WORTH_SAYING and before.total_bytes:
        return {}
    size = {"total_bytes": seen.total_bytes, "usable_bytes": usable(seen.total_bytes, seen.free_bytes, mine)}
    others = used - mine - sum(seen.held[pid] for pid in ours.daemons)
    if others < WORTH_SAYING:
        return size | {"foreign": "", "foreign_bytes": 0}
    strange = seen.held.keys() - ours.held.keys() - set(ours.daemons)
    most = sorted(strange, key=seen.held.__getitem__, reverse=True)[:3]
    named = ", ".join(f"pid {pid} {_name(pid)}" for pid in most)
    said = f"{others / GIB:.1f} GiB held by other processes" + (f" ({named})" if named else "")
    return size | {"foreign": said, "foreign_bytes": others}


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "(ended)"


class Watch(Protocol):
    """Looks after what a worker serves."""

    limits: bool
    """Whether jobs can be held to what they were promised: a GPU's memory can, a machine's is not."""

    @property
    def health(self) -> Health:
        """By the last look, a few seconds ago at most."""

    @property
    def load(self) -> Load:
        """How busy it is, by the last look."""

    def look(self) -> Health:
        """Now."""

    def freed(self, mark: str, grace_s: float) -> int:
        """Waits until the processes of that trainer, which has ended, hold no memory; the bytes that stay held."""


class MainMemory:
    """A machine's own memory: what a worker of the CPU, or of nothing, serves."""

    limits = False

    def __init__(self, usable_bytes: int) -> None:
        self.health = Health(usable_bytes)

    @property
    def load(self) -> Load:
        return machine_load() if self.health.usable_bytes else Load()

    def look(self) -> Health:
        return self.health

    def freed(self, mark: str, grace_s: float) -> int:
        return 0


class CardWatch:
    """Looks at a card every few seconds, from a thread of its own: a call of the driver's may hang.

    Args:
        mark_of: the mark of a process that a trainer (or, by that name, a daemon) of this worker is, or has started;
            None for any other.
        alive: whether there are trainers now.
    """

    limits = True

    def __init__(
        self,
        card: Card,
        mark_of: Callable[..., str | None],
        alive: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._card, self._mark_of, self._alive, self._clock = card, mark_of, alive, clock
        self._health = self._said = Health()
        self.load = Load()
        self._held: Mapping[int, int] = {}
        self._marks: dict[int, str] = {}  # of processes of ours that hold memory, also when they have ended
        self._wanted = threading.Event()
        self._looked = threading.Condition()
        self._looks, self._began_at = 0, math.inf  # those that are done, and since when one goes on
        threading.Thread(target=self._run, name="card", daemon=True).start()
        self.look()

    @property
    def health(self) -> Health:
        hangs_s = time.monotonic() - self._began_at
        if hangs_s < SILENT_S:
            return self._health
        return replace(self._health, sick=f"the driver does not answer for {hangs_s:.0f} s", ends_jobs=True)

    def look(self) -> Health:
        with self._looked:
            enough = self._looks + (1 if self._began_at == math.inf else 2)
            self._wanted.set()
            self._looked.wait_for(lambda: self._looks >= enough, ASKED_S)
        return self.health

    def _run(self) -> None:
        while True:
            self._wanted.clear()
            self._began_at = time.monotonic()
            self._look()
            with self._looked:
                self._began_at = math.inf
                self._looks += 1
                self._looked.notify_all()
            self._wanted.wait(RESET_LOOK_S if self._health.needs_reset else LOOK_S)

    def _look(self) -> None:
        seen: Reading | CardError
        try:
            seen = self._card.read()
        except CardError as error:
            seen, ours, self.load = error, NOBODY, Load()
        else:
            self.load = seen.load
            marks = {pid: self._mark_of(pid) or self._marks.get(pid) for pid in seen.held}
            self._held, self._marks = seen.held, {pid: mark for pid, mark in marks.items() if mark}
            alive = {pid: seen.held[pid] for pid in self._marks if psutil.pid_exists(pid)}
            daemons = {pid for pid in seen.held if pid not in self._marks and self._mark_of(pid, name=DAEMON)}
            ours = Ours(alive, self._alive(), daemons)
        self._health = self._health.after(seen, ours, self._clock())
        if self._health.ends_jobs:
            self._card.close()  # else nobody could reset it
        if self._health.is_news_after(self._said):
            self._said = self._health
            log.warning("%s", self._health.note or "the card is well, and nobody else holds its memory")

    def freed(self, mark: str, grace_s: float) -> int:
        give_up_at = time.monotonic() + grace_s
        while True:
            self.look()
            left = sum(held for pid, held in self._held.items() if self._marks.get(pid) == mark)
            if not left or time.monotonic() >= give_up_at:
                return left
            time.sleep(0.2)


def watch(device: Device, cache: Path, alive: Callable[[], bool]) -> Watch:
    """Whoever looks after that device; `cache` is the worker's own, by which its trainers are known."""
    if device.kind == "gpu":
        return CardWatch(Card(device.uuid), partial(mark_of, cache=cache), alive)
    return MainMemory(main_memory_bytes() if device.kind == "cpu" else 0)
