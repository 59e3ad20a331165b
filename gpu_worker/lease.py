"""A worker's hold on a job: renewed while the attempt lasts, given up with the attempt's end."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from gpu_worker import guardian
from gpu_worker.trainer_process import TrainerProcess
from jobqueue.errors import MachineError, ServerError, StaleAttemptError, UnansweredError
from jobqueue.job import Claim, Settlement
from jobqueue.settings import Settings
from jobqueue.store import Store

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
KILL_S = 1.0  # what a guardian may need, at most, from its deadline to the last process' end


class Refused:
    """How long the server has refused the same call while it renewed. It may refuse for a while, as with its disk full,
    but then renewals as well."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s, self._since = lease_s, math.inf

    def for_good(self, error: ServerError, *, renewed: bool) -> bool:
        """Whether this error is one more in a lease of refusals."""
        counts = renewed and not isinstance(error, UnansweredError)
        self._since = min(self._since, guardian.now()) if counts else math.inf
        return guardian.now() >= self._since + self._lease_s


class Lease:
    """Renews a claim from a thread of its own, tells the guardian each new deadline, hears of a cancel.

    The deadline that the guardian gets is counted from before the renewal was sent, so that it lies before the
    one that the server keeps: a cut-off trainer is dead before anyone else may claim its job.

    Raises MachineError where this machine has no thread left for it.
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
        try:
            self._thread.start()
        except RuntimeError as error:
            raise MachineError(
                f"a lease cannot be renewed: {error}", "See the limits on processes (ulimit -u)."
            ) from None

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
            except Exception:  # for want of memory, say: the next time it may go well
                log.exception("%s: not renewed", self._claim.job_id)
                continue
            with self._lock:
                self._overran = self.overran
                self.deadline = asked_at + self._settings.lease_s - self._margin
                if self._trainer is not None:
                    self._trainer.set_deadline(self.deadline)

    def insist(self, ask: Callable[[], Answer]) -> Answer:
        """What the server answers, however long it is away.

        Raises StaleAttemptError where the job was given to another meanwhile, the worker has to go, or the server goes
        on refusing.
        """
        refused = Refused(self._settings.lease_s)
        while True:
            try:
                return ask()
            except ServerError as error:
                log.warning("%s: no answer yet: %s", self._claim.job_id, error.what)
                if self.lost.wait(self._settings.renew_s) or self._hopeless(refused, error):
                    raise StaleAttemptError(f"{self._claim.job_id}: its lease ended without an answer") from error

    def _hopeless(self, refused: Refused, error: ServerError) -> bool:
        """The worker has to go, or is refused what it asks while its renewals are not: the sweeper, and the manifest,
        will speak for the attempt."""
        renewed = guardian.now() <= self.deadline
        return refused.for_good(error, renewed=renewed) or (self._leaving.is_set() and not renewed)

    def settle(self, end: Settlement) -> list[str]:
        """Says how the attempt ended until the server has taken it; the classes to wake.

        Raises StaleAttemptError where the job was given to another meanwhile.
        """
        refused = Refused(self._settings.lease_s)
        while True:
            try:
                classes = self._store.settle(self._claim, end)
                log.info("%s: attempt %d %s %s", self._claim.job_id, self._claim.attempt, end.state, end.message)
                return classes
            except ServerError as error:
                log.warning("%s: not settled yet: %s", self._claim.job_id, error.what)
                time.sleep(self._settings.renew_s)
                if self._hopeless(refused, error):
                    log.error("%s: not settled, its lease will end: %s", self._claim.job_id, error.what)
                    return []
