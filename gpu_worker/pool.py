"""The trainers of a worker: one is started for a job, and may go on with the next job of the same base model.

Importing Unsloth takes 13 s on two CPU cores and half a minute beside a GPU, so a trainer that ended its job well is
kept for a while. It has freed its memory and checked that (gpu_worker/trainer/child.py), or it has left.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_worker.trainer_process import TrainerProcess

IDLE_S = 60.0  # how long a trainer waits for another job before it is ended


class TrainerPool:
    """At most one resting trainer; several may be at work."""

    def __init__(
        self,
        environment: Mapping[str, str],
        folder: Path,
        grace_s: float,
        command: Sequence[str] | None = None,
    ) -> None:
        self._environment, self.folder, self._grace_s = environment, folder, grace_s
        self._command = list(command) if command else [sys.executable, "-P", "-m", "gpu_worker.trainer.child"]
        self._resting: tuple[TrainerProcess, str, float] | None = None
        self._lock = threading.Lock()

    def take(self, base_model: str) -> TrainerProcess:
        """The resting trainer if it knows that base model, else a new one."""
        with self._lock:
            resting, self._resting = self._resting, None
        if resting is not None:
            trainer, known, _ = resting
            if known == base_model and trainer.alive():
                return trainer
            trainer.kill()
        return TrainerProcess(self._command, self._environment, self.folder, self._grace_s)

    def give_back(self, trainer: TrainerProcess, base_model: str, *, clean: bool) -> None:
        """To rest where it ended its job well, to its end otherwise; nothing of it is left then."""
        if not clean or not trainer.alive():  # its guardian may have ended it right after its last word
            trainer.kill()
            return
        trainer.rest()
        with self._lock:
            before, self._resting = self._resting, (trainer, base_model, time.monotonic())
        if before is not None:
            before[0].kill()

    def expire(self, idle_s: float = IDLE_S) -> None:
        """Ends a trainer that has rested for longer."""
        with self._lock:
            if self._resting is None or time.monotonic() - self._resting[2] < idle_s:
                return
            trainer, self._resting = self._resting[0], None
        trainer.kill()

    @property
    def empty(self) -> bool:
        """Whether no trainer rests here."""
        return self._resting is None

    def close(self) -> None:
        self.expire(idle_s=0)
