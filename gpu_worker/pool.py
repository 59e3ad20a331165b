"""The trainers of a worker: started for a job, or beforehand as spares; one may go on with the next job of its model.

Importing Unsloth takes 13 s on two CPU cores and half a minute beside a GPU. So a few trainers have it imported before
there is a job, and a trainer that ended its job well is kept for a while. It has freed its memory and checked that
(gpu_worker/trainer/child.py), or it has left.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_worker.mps import Mps
from gpu_worker.trainer_process import TrainerProcess

log = logging.getLogger(__name__)
IDLE_S = 60.0  # how long a trainer waits for another job of its model before it is ended
FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 600.0  # before a spare is started again, where one has ended by itself
CALM_S = 60.0  # after one that lived so long, the pause is the first again
IMPORT_S = 600.0  # a spare that has not imported everything by then never will


@dataclass(frozen=True)
class Resting:
    """A trainer without a job."""

    trainer: TrainerProcess
    base_model: str | None  # that it has worked with; None: a spare
    since: float


class TrainerPool:
    """The trainers that rest; those at work are with their attempts.

    Args:
        environment, folder, grace_s: of the trainers.
        command: what a trainer is; None: the one with Unsloth.
        spares: how many are to stand ready before there is a job.
        most: how many may rest now, the spares among them.
        mps: whose clients the trainers are, where the GPU has it.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        folder: Path,
        grace_s: float,
        command: Sequence[str] | None = None,
        spares: int = 0,
        most: Callable[[], int] = lambda: 1,
        mps: Mps | None = None,
    ) -> None:
        self._environment, self.folder, self._grace_s = environment, folder, grace_s
        self._spares, self._most, self.mps = spares, most, mps
        self._command = list(command) if command else [sys.executable, "-P", "-m", "gpu_worker.trainer.child"]
        self.at_work = 0  # trainers that attempts have taken
        self._resting: list[Resting] = []  # the one that began to rest last comes last
        self._lock = threading.Lock()
        self._pause_s = self._start_at = 0.0

    def take(self, base_model: str, *, alone: bool = False) -> TrainerProcess:
        """A resting trainer that knows the base model, else a spare, else a new one; what may not rest on is ended.

        Whatever becomes of it is to be given back. With `alone` it is a new one that is no client of MPS.
        """
        with self._lock:
            self.at_work += 1
        resting = None
        while not alone and (resting := self._pick(base_model)) is not None and not resting.trainer.alive():
            resting.trainer.kill()
        with self._lock:
            surplus = self._surplus()
        for other in surplus:
            other.trainer.kill()
        try:
            return resting.trainer if resting is not None else self._start(alone=alone)
        except BaseException:
            with self._lock:
                self.at_work -= 1
            raise

    def _pick(self, base_model: str) -> Resting | None:
        with self._lock:
            for known in (base_model, None):
                for resting in reversed(self._resting):
                    if resting.base_model == known:
                        self._resting.remove(resting)
                        return resting
        return None

    def _start(self, *, alone: bool = False) -> TrainerProcess:
        if self.mps is None or alone:
            return TrainerProcess(self._command, self._environment, self.folder, self._grace_s)
        environment = {**self._environment, **self.mps.environment}
        trainer = TrainerProcess(self._command, environment, self.folder, self._grace_s, self.mps.part)
        self.mps.joined(trainer)
        return trainer

    def give_back(self, trainer: TrainerProcess, base_model: str, *, clean: bool) -> None:
        """To rest where it ended its job well, to its end otherwise; nothing of it is left then."""
        alone = self.mps is not None and not trainer.in_mps
        if not clean or alone or not trainer.alive():  # its guardian may have ended it right after its last word
            trainer.kill()
            with self._lock:
                self.at_work -= 1
            return
        trainer.rest()
        with self._lock:
            self.at_work -= 1
            self._resting.append(Resting(trainer, base_model, time.monotonic()))

    def _surplus(self) -> list[Resting]:
        """Those that have rested longest, as far as more rest than may; they are no longer the pool's."""
        place = max(0, len(self._resting) - self._most())
        surplus, self._resting = self._resting[:place], self._resting[place:]
        return surplus

    def tend(self, idle_s: float = IDLE_S, import_s: float = IMPORT_S) -> None:
        """Ends what rests for long, is too many, hangs in its import, or is dead; starts the spares that lack."""
        now = time.monotonic()
        with self._lock:
            tired = [r for r in self._resting if r.base_model is not None and now - r.since >= idle_s]
            spares = [r for r in self._resting if r.base_model is None]
            dead = [r for r in spares if not r.trainer.alive() or (not r.trainer.ready and now - r.since >= import_s)]
            self._resting = [r for r in self._resting if r not in tired and r not in dead]
            surplus = self._surplus()
            lack = min(self._spares - len(spares) + len(dead), self._most() - len(self._resting))
            if self.at_work:  # one after the other: an import takes a core, which those at work may need
                lack = min(lack, int(all(spare.trainer.ready for spare in spares if spare not in dead)))
        for resting in (*tired, *dead, *surplus):
            resting.trainer.kill()
        if dead:
            calm = all(now - resting.since >= CALM_S for resting in dead)
            self._pause_s = FIRST_PAUSE_S if calm else min(max(FIRST_PAUSE_S, 2 * self._pause_s), LAST_PAUSE_S)
            self._start_at = now + self._pause_s
            log.warning("a spare trainer has ended by itself, or hung; the next is started in %g s", self._pause_s)
        for _ in range(lack if now >= self._start_at else 0):
            spare = Resting(self._start(), None, time.monotonic())
            spare.trainer.rest()
            with self._lock:
                self._resting.insert(0, spare)

    @property
    def resting(self) -> int:
        """How many rest."""
        return len(self._resting)

    @property
    def spares(self) -> int:
        """How many of them have done no job yet."""
        return sum(resting.base_model is None for resting in self._resting)

    def close(self) -> None:
        """Ends all that rest."""
        with self._lock:
            resting, self._resting = self._resting, []
        for one in resting:
            one.trainer.kill()
