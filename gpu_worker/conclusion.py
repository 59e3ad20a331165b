"""What the end of a trainer's work on a job means for the job."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_worker.admission import grown
from gpu_worker.health import Watch
from gpu_worker.lease import Lease
from gpu_worker.patience import Patience
from gpu_worker.protocol import Failed, Request, Result
from gpu_worker.stop import Stopped
from gpu_worker.trainer_process import Ended
from jobqueue.errors import ServerError
from jobqueue.job import Claim, FailureReason, JobState, Settlement
from jobqueue.memory import CONTEXT, GIB, kind_of
from jobqueue.retry import after_failure
from jobqueue.settings import Settings
from jobqueue.storage import Storage, attempt_folder
from jobqueue.store import Store

End = Result | Failed | Ended | Stopped
"""How a trainer's work on a job ended."""


class Conclusion:
    """Makes the settlement of one attempt.

    Args:
        budget_bytes: what the job was promised of the GPU; None where nothing can be promised.
    """

    def __init__(
        self,
        claim: Claim,
        store: Store,
        storage: Storage,
        settings: Settings,
        lease: Lease,
        patience: Patience,
        watch: Watch,
        budget_bytes: int | None,
        log: Path,
    ) -> None:
        self._claim, self._store, self._storage, self._settings = claim, store, storage, settings
        self._lease, self._patience, self._watch = lease, patience, watch
        self._budget, self._log = budget_bytes, log
        self.before: list[dict[str, Any]] = []  # the job's earlier attempts, oldest first

    def after(self, end: End, request: Request, last_lines: list[str]) -> Settlement:
        """Of an attempt whose trainer ended so; a result is written first."""
        match end:
            case Result():
                return self._succeed(request, end.outcome)
            case Failed(reason=FailureReason.INTERNAL) | Ended() if sick := self._watch.look().sick:
                return self.failure(FailureReason.DEVICE, f"the GPU failed: {sick}")
            case Failed(reason=FailureReason.OUT_OF_MEMORY) if taken := self._taken():
                return self.failure(FailureReason.DEVICE, f"memory ran out: {taken}")
            case Failed(reason=FailureReason.OUT_OF_MEMORY):
                return self._without_memory(end)
            case Failed():
                return self.failure(FailureReason(end.reason), end.message)
            case Ended():
                return self.failure(FailureReason.CRASHED, f"{end}; its last words: {(last_lines or ['none'])[-1]}")
            case Stopped():
                if end.reason is None:
                    return Settlement(JobState.CANCELLED, message=end.message)
                return self.failure(end.reason, end.message)

    def _succeed(self, request: Request, outcome: dict[str, Any]) -> Settlement:
        if not self._claim.leaves_files:
            return Settlement(JobState.SUCCEEDED, outcome=outcome)
        output = Path(request.output)
        shutil.copy(self._log, output / "log.txt")
        folder = attempt_folder(self._claim)
        outcome = {**outcome, "folder": folder}
        manifest = {
            "job": self._claim.job_id,
            "submission": self._claim.submission,
            "attempt": self._claim.attempt,
            "spec": self._claim.spec,
            "outcome": outcome,
            "published_at": time.time(),
        }
        self._patience("write the result", lambda: self._storage.publish(output, folder, manifest), graces=2)
        self._learn(outcome, request.correction)
        return Settlement(JobState.SUCCEEDED, outcome=outcome)

    def _without_memory(self, end: Failed) -> Settlement:
        """Smaller micro-batches next time; where there are none, more memory, if this device or one of another worker
        has more than the job was given; else the job has failed."""
        again = self.failure(FailureReason.OUT_OF_MEMORY, end.message)
        if end.rung is not None:
            return replace(again, rung=end.rung)
        workers = self._lease.insist(self._store.workers)
        others = [worker.usable_bytes for worker in workers if worker.alive and worker.uuid]
        most = max(self._watch.look().usable_bytes, *others, 0)
        if self._budget is not None and (need := grown(self._budget, most)):
            message = f"{end.message} (with {self._budget / GIB:.1f} GiB of its own; it is given {need / GIB:.1f} next)"
            return replace(again, message=message, rung=self._claim.rung, need_bytes=need)
        message = f"{end.message} (nothing smaller is left: the micro-batch is one row)"
        return Settlement(JobState.FAILED, FailureReason.OUT_OF_MEMORY, message, counts=True)

    def _learn(self, outcome: dict[str, Any], correction: float) -> None:
        """What the job took, for the estimates of those like it; its own estimate was corrected already."""
        memory = outcome.get("memory", {})
        if memory.get("kind") == "gpu" and memory.get("estimated_bytes"):
            ratio = correction * (memory["peak_reserved_bytes"] + CONTEXT) / memory["estimated_bytes"]
            with contextlib.suppress(ServerError):
                self._store.learn(kind_of(self._claim.spec), ratio)

    def _taken(self) -> str:
        """Who else holds memory of the card, where what is left is less than this job was admitted for."""
        health = self._watch.look()
        return health.foreign if health.usable_bytes < self._claim.need_bytes else ""

    def failure(self, reason: FailureReason, message: str) -> Settlement:
        before = [end["reason"] for end in self.before]
        return after_failure(reason, message, self._claim.failures, self._settings.max_failures, before)
