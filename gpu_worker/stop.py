"""When a worker ends a running trainer, and how."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpu_worker.checkpoints import CheckpointKeeper
from gpu_worker.health import Watch
from gpu_worker.lease import Lease
from gpu_worker.marks import KILLED_S
from gpu_worker.mps import Mps
from gpu_worker.trainer_process import TrainerProcess
from jobqueue.job import FailureReason
from jobqueue.settings import Settings

ON_REQUEST = "on request"
TOLD_TO_STOP = "the worker was told to stop"


@dataclass(frozen=True)
class Stopped:
    """The worker ended the trainer."""

    reason: FailureReason | None  # None: the user cancelled
    message: str


CUT_OFF = Stopped(FailureReason.CUT_OFF, "its worker had no answer from the server for a lease and ended the trainer")
"""It was the guardian, at the lease's end."""


class Stop:
    """Ends a running trainer: at once for a cancel, a time limit, a failed card; after a checkpoint for a drain."""

    def __init__(
        self,
        lease: Lease,
        draining: Callable[[], bool],
        keeper: CheckpointKeeper,
        trainer: TrainerProcess,
        watch: Watch,
        settings: Settings,
        timeout_minutes: float | None,
        mps: Mps | None = None,
    ) -> None:
        self._lease, self._draining, self._keeper, self._trainer = lease, draining, keeper, trainer
        self._watch, self._mps = watch, mps
        self._grace_s, self._stall_s = settings.grace_s, settings.stall_s
        self._began_at = self.heard_at = time.monotonic()
        self._timeout_s = timeout_minutes * 60 if timeout_minutes else math.inf
        self.can_save = False  # it trains: there is something to save
        self.begun: Stopped | None = None
        self._overdue_at = math.inf
        self._wait_for: tuple[int, float] | None = None  # more checkpoints than these, or until then

    def look(self) -> None:
        """To be called again and again: sees what is due and does it."""
        now = time.monotonic()
        if self.begun is not None:
            return
        if self._lease.cancelled.is_set():
            self._end(Stopped(None, ON_REQUEST))
        elif (health := self._watch.health).ends_jobs:
            self._end(Stopped(FailureReason.DEVICE, f"the GPU failed: {health.sick}"))
        elif self._mps and (doomed := self._mps.doomed(self._trainer)):
            self._end(Stopped(FailureReason.DEVICE, doomed))
        elif now - self._began_at > self._timeout_s:
            limit = f"resources.timeout_minutes ({self._timeout_s / 60:g})"
            self._end(Stopped(FailureReason.TIMED_OUT, f"the attempt took longer than {limit}"))
        elif now - self.heard_at > self._stall_s:
            self._end(Stopped(FailureReason.CRASHED, f"the trainer gave no sign of life for {self._stall_s:g} s"))
        elif self._draining():
            if self._wait_for is None:
                self._wait_for = (self._keeper.kept, now + (self._grace_s if self.can_save else 0.0))
                if self.can_save:
                    self._trainer.ask_checkpoint()
            kept_before, give_up_at = self._wait_for
            if self._keeper.kept > kept_before or now >= give_up_at:
                self._end(Stopped(FailureReason.PREEMPTED, TOLD_TO_STOP))
        else:
            self._wait_for = None  # what was told may have been taken back

    def _end(self, why: Stopped) -> None:
        self.begun = why
        self._watch.look()  # so that it is known whose memory is to come back
        self._trainer.stop()
        self._overdue_at = time.monotonic() + self._grace_s + KILLED_S

    @property
    def overdue(self) -> bool:
        """Whether the trainer should have ended by now: its guardian hangs, or a process that no signal ends, as
        after a GPU has failed."""
        return time.monotonic() >= self._overdue_at
