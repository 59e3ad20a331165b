"""A worker's hold on a job: renewed while the attempt lasts, given up with the attempt's end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from gpu_worker import guardian
from gpu_worker.trainer_process import TrainerProcess
from jobqueue.errors import ServerError, StaleAttemptError
from jobqueue.job import Claim, Settlement
from jobqueue.settings import Settings
from jobqueue.store import Store

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
KILL_S = 1.0  # what a guardian may need, at most, from its deadline to the last process' end


class Lease:
    """Renews a claim from a thread of its own, tells the guardian each new deadline, hears of a cancel.

    The deadline that the guardian gets is counted from before the renewal was sent, so that it lies before the
    one that the server keeps: a cut-off trainer is dead before anyone else may claim its job.
    """

    def __init__(
        self, store: Store, claim: Claim, settings: Settings, claimed_at: float, leaving: threading.Event
    ) -> None:
        self._store, self._claim, self._settings, self._leaving = store, claim, settings, leaving
        self._margin = min(2 * KILL_S, settings.lease_s / 4)
        self.deadline = claimed_at + settings.lease_s - self._margin
        self.cancelled = threading.Event()
        self.lost = threading.Event()  # by the server's word: the job is another's, or has ended
        self._overran = False
        self._trainer: TrainerProcess | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease-{claim.job_id}", daemon=True)
        self._thread.start()

    def guard(self, trainer: TrainerProcess) -> None:
        """From now on that trainer lives no longer than the lease."""
        with self._lock:
            trainer.set_deadline(self.deadline)
            self._trainer, self._overran = trainer, False

    def release(self) -> None:
        """The trainer has done its part: it may rest, or work for another, beyond this lease."""
        with self._lock:
            self._trainer = None

    @property
    def overran(self) -> bool:
        """Whether the deadline that the trainer's guardian was told has passed, even if an answer came since."""
        return self._overran or guardian.now() >= self.deadline

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._done.wait(self._settings.renew_s):
            asked_at = guardian.now()
            try:
                if self._store.renew(self._claim):
                    self.cancelled.set()
            except StaleAttemptError:
                self.lost.set()
                return
            except ServerError as error:
                log.warning("%s: not renewed: %s", self._claim.job_id, error.what)
                continue
            with self._lock:
                self._overran = self.overran
                self.deadline = asked_at + self._settings.lease_s - self._margin
                if self._trainer is not None:
                    self._trainer.set_deadline(self.deadline)

    def insist(self, ask: Callable[[], Answer]) -> Answer:
        """What the server answers, however long it is away.

        Raises StaleAttemptError where the job was given to another meanwhile, or the worker has to go.
        """
        while True:
            try:
                return ask()
            except ServerError as error:
                log.warning("%s: no answer yet: %s", self._claim.job_id, error.what)
                if self.lost.wait(self._settings.renew_s) or self._hopeless:
                    raise StaleAttemptError(f"{self._claim.job_id}: its lease ended without an answer") from error

    @property
    def _hopeless(self) -> bool:
        """The worker has to go; the sweeper, and the manifest, will speak for the attempt."""
        return self._leaving.is_set() and guardian.now() > self.deadline

    def settle(self, end: Settlement) -> list[str]:
        """Says how the attempt ended until the server has taken it; the classes to wake.

        Raises StaleAttemptError where the job was given to another meanwhile.
        """
        while True:
            try:
                classes = self._store.settle(self._claim, end)
                log.info("%s: attempt %d %s %s", self._claim.job_id, self._claim.attempt, end.state, end.message)
                return classes
            except ServerError as error:
                log.warning("%s: not settled yet: %s", self._claim.job_id, error.what)
                time.sleep(self._settings.renew_s)
                if self._hopeless:
                    return []
