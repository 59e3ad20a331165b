"""One attempt of a job that needs no GPU and no trainer, from its claim to its settlement."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_worker.journal import Journal
from gpu_worker.lease import Lease
from gpu_worker.patience import DrainedError, Patience
from gpu_worker.report import make_report
from gpu_worker.stop import ON_REQUEST
from jobqueue.errors import ChatTemplateError, DataError, LoraqError, SpecError, StaleAttemptError, StorageError
from jobqueue.job import Claim, FailureReason, JobKind, JobState, Settlement
from jobqueue.retry import after_failure
from jobqueue.settings import Settings
from jobqueue.storage import Storage, attempt_folder
from jobqueue.store import Store

log = logging.getLogger(__name__)
STOPPED = "its worker was drained or stopped"


class EndedEarlyError(Exception):
    """The attempt was cancelled, or its worker drained."""

    def __init__(self, reason: FailureReason | None) -> None:
        super().__init__(reason)
        self.reason = reason  # None: the user cancelled


class ControlAttempt:
    """Runs a claim to its end: every way out of `run` has settled it, or found that it is not its own any more."""

    def __init__(
        self,
        claim: Claim,
        claimed_at: float,
        store: Store,
        storage: Storage,
        settings: Settings,
        folder: Path,
        leaving: threading.Event,
        draining: Callable[[], bool],
        wake: Callable[[list[str]], None],
    ) -> None:
        self._claim, self._store, self._storage, self._settings = claim, store, storage, settings
        self._folder, self._draining, self._wake = folder, draining, wake
        self._lease = Lease(store, claim, settings, claimed_at, leaving)
        self._patience = Patience(self._lease, settings, draining)
        self._hasty = Patience(self._lease, settings, draining, draining)  # for what is soon done again

    def run(self) -> None:
        try:
            self._wake(self._lease.settle(self._end()))
        except StaleAttemptError as error:
            log.warning("%s", error.what)
        finally:
            self._lease.close()

    def _end(self) -> Settlement:
        """How the attempt ended. Raises StaleAttemptError where the job was lost to another."""
        try:
            return Settlement(JobState.SUCCEEDED, outcome=self._work())
        except StaleAttemptError:
            raise
        except EndedEarlyError as early:
            if early.reason is None:
                return Settlement(JobState.CANCELLED, message=ON_REQUEST)
            return self._failure(early.reason, STOPPED)
        except DrainedError:
            return self._failure(FailureReason.PREEMPTED, STOPPED)
        except LoraqError as error:
            reason = getattr(error, "reason", _reason(error))  # a judge's errors know theirs
            if isinstance(error, StorageError) and self._lease.cancelled.is_set():
                return Settlement(JobState.CANCELLED, message=ON_REQUEST)
            log.warning("%s: attempt %d: %s", self._claim.job_id, self._claim.attempt, error.what)
            return self._failure(reason, f"{error.what}. {error.do}" if reason is FailureReason.REFUSED else error.what)
        except Exception as error:  # a fault of loraq's own: the job ends with a word, the slot goes on
            log.exception("%s: attempt %d broke", self._claim.job_id, self._claim.attempt)
            return self._failure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")

    def _work(self) -> dict[str, Any]:
        if self._claim.spec["kind"] == JobKind.REPORT:
            return self._lease.insist(partial(make_report, self._claim, self._store, self._storage, self._hasty))
        if self._claim.spec["kind"] == JobKind.PREVIEW:
            from gpu_worker.preview import make_preview  # Jinja and all that reads tokens

            return self._lease.insist(partial(make_preview, self._claim, self._storage, self._settings, self._hasty))
        from gpu_worker.judge import judge_batch  # half a second, for those who have a judge

        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            file = Path(scratch) / "log.txt"
            try:
                with Journal(self._store, self._claim, file) as journal:
                    return judge_batch(
                        self._claim,
                        self._store,
                        self._storage,
                        self._settings,
                        self._lease,
                        self._patience,
                        self._hasty,
                        journal,
                        self._check,
                    )
            finally:
                self._keep_log(file)

    def _check(self) -> None:
        """Raises where the attempt is to end early."""
        if self._lease.lost.is_set():
            raise StaleAttemptError(f"{self._claim.job_id}: its lease was lost")
        if self._lease.cancelled.is_set():
            raise EndedEarlyError(None)
        if self._draining():
            raise EndedEarlyError(FailureReason.PREEMPTED)

    def _keep_log(self, file: Path) -> None:
        try:
            name, text = f"{attempt_folder(self._claim)}/log.txt", file.read_text(encoding="utf-8")
            self._patience("keep the log", lambda: self._storage.write_text(name, text))
        except (LoraqError, OSError) as error:
            log.warning("%s: its log is not kept: %s", self._claim.job_id, error)

    def _failure(self, reason: FailureReason, message: str) -> Settlement:
        return after_failure(reason, message, self._claim.failures, self._settings.max_failures)


def _reason(error: LoraqError) -> FailureReason:
    """What is tried again may be there later."""
    if isinstance(error, ChatTemplateError) or type(error) in (LoraqError, SpecError):
        return FailureReason.BAD_SPEC
    return FailureReason.BAD_DATA if isinstance(error, DataError) else FailureReason.STORAGE
