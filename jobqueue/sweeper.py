"""The periodic round that keeps promises when nobody else can: expired leases, estimates, lost wake-ups.

Every host's control worker sweeps; each step is atomic in the store, so that they do not get in each other's way.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from jobqueue import base_model
from jobqueue.broker import MAX_TOKENS, queue_name, send_tokens
from jobqueue.errors import LoraqError, ServerError, StaleAttemptError
from jobqueue.job import Claim, FailureReason, Job, JobState
from jobqueue.memory import estimate, memory_class
from jobqueue.retry import decide
from jobqueue.settings import Settings
from jobqueue.spec import EvaluateSpec, JobSpec, ReportSpec, TrainSpec
from jobqueue.store import Settlement, Store

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)
PARSE: TypeAdapter[TrainSpec | EvaluateSpec | ReportSpec] = TypeAdapter(JobSpec)


class Sweeper:
    """One round at a time over the store of `settings`."""

    def __init__(self, store: Store, app: Celery, settings: Settings) -> None:
        self._store, self._app, self._settings = store, app, settings

    def run(self, stop: threading.Event) -> None:
        """Rounds until `stop`; a server that is away is waited for."""
        while not stop.wait(self._settings.sweep_s):
            try:
                self.round()
            except ServerError as error:
                log.warning("no sweep: %s", error.what)

    def round(self) -> None:
        found = self._store.sweep(self._settings.lease_s)
        for job_id, attempt, nonce in found.expired:
            self._expire(job_id, attempt, nonce)
        for job_id in found.unsized:
            self._size(self._store.job(job_id))
        for memory_class_, jobs in found.queues.items():
            missing = min(jobs, MAX_TOKENS) - self._store.tokens(queue_name(memory_class_))
            send_tokens(self._app, [memory_class_] * missing)

    def _expire(self, job_id: str, attempt: int, nonce: str) -> None:
        """The attempt's worker was silent for a lease: its trainer is dead, the job goes on elsewhere or ends."""
        job = self._store.job(job_id)
        decision = decide(FailureReason.LOST, job.failures, self._settings.max_failures)
        claim = Claim(job_id, attempt, nonce, {}, job.batch, job.failures, self._settings.lease_s)
        end = Settlement(
            state=JobState.QUEUED if decision.again else JobState.FAILED,
            reason=FailureReason.LOST,
            message=f"worker {job.worker} was not heard of for {self._settings.lease_s:g} s",
            delay_s=decision.delay_s,
            counts=decision.counts,
        )
        try:
            send_tokens(self._app, self._store.settle(claim, end, only_expired=True))
        except StaleAttemptError:
            return  # it renewed after all, or another sweeper was quicker
        log.info("%s: attempt %d was lost on %s", job_id, attempt, job.worker)

    def _size(self, job: Job) -> None:
        """Estimates the memory of a job whose submitter could not."""
        spec = PARSE.validate_python(job.spec, strict=False)
        assert isinstance(spec, (TrainSpec, EvaluateSpec))
        config = base_model.read_config(spec.base_model)
        try:
            need = estimate(config, spec) if config else base_model.guess_from_size(spec.base_model)
        except (KeyError, TypeError, LoraqError):
            need = base_model.guess_from_size(spec.base_model)
        send_tokens(self._app, self._store.size(job.id, need, memory_class(need)))
