"""The periodic round that keeps promises when nobody else can: expired leases, estimates, lost wake-ups, old batches.

Every host's control worker sweeps; each step is atomic in the store, so that they do not get in each other's way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from jobqueue import base_model
from jobqueue.archive import DAY_S, archive_old
from jobqueue.broker import MAX_TOKENS, queue_name, send_tokens
from jobqueue.errors import LoraqError, ServerError, StaleAttemptError
from jobqueue.job import Claim, FailureReason, Job
from jobqueue.job_spec import ControlSpec, JobSpec
from jobqueue.memory import estimate, kind_of, memory_class
from jobqueue.retry import after_failure
from jobqueue.settings import Settings
from jobqueue.storage import Storage
from jobqueue.store import Store

if TYPE_CHECKING:
    from celery import Celery

LOOK_AT_SERVER_S = 60.0
LOOK_FOR_OLD_S = 3600.0

log = logging.getLogger(__name__)
PARSE: TypeAdapter[JobSpec] = TypeAdapter(JobSpec)


class Sweeper:
    """One round at a time over the store of `settings`; without a storage, nothing is archived."""

    def __init__(self, store: Store, app: Celery, settings: Settings, storage: Storage | None = None) -> None:
        self._store, self._app, self._settings, self._storage = store, app, settings, storage
        self._archiving: threading.Thread | None = None
        self._archive_at = 0.0
        self._sizing: threading.Thread | None = None
        self._warnings: list[str] = []
        self._look_at = 0.0
        self.sweep_s: float | None = None  # how long the last one took, and when it ended, since the epoch
        self.swept_at: float | None = None

    def run(self, stop: threading.Event) -> None:
        """Rounds until `stop`; a server that is away is waited for."""
        while not stop.wait(self._settings.sweep_s):
            try:
                self.look_at_server()
                self.look_for_old()
                began = time.monotonic()
                self.round()
                self.sweep_s, self.swept_at = time.monotonic() - began, time.time()
            except ServerError as error:
                log.warning("no sweep: %s", error.what)
            except Exception:  # the next round is needed all the same
                log.exception("a sweep broke off")

    def look_at_server(self) -> None:
        """Says once what is set on the server so that it may lose jobs; now and then, since settings change."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_AT_SERVER_S
        before, self._warnings = self._warnings, self._store.keeping().warnings
        for text in set(self._warnings) - set(before):
            log.warning("Redis at %s %s", self._store.where, text)

    def look_for_old(self) -> None:
        """Now and then archives batches that ended long ago; beside the rounds, as a storage may hang."""
        days = self._settings.archive_days
        busy = self._archiving is not None and self._archiving.is_alive()
        if self._storage is None or not days or busy or time.monotonic() < self._archive_at:
            return
        self._archive_at = time.monotonic() + min(LOOK_FOR_OLD_S, days * DAY_S)
        self._archiving = threading.Thread(target=archive_old, args=(self._store, self._storage, days), daemon=True)
        self._archiving.start()

    def round(self) -> None:
        found = self._store.sweep(self._settings.sweep_s)
        for job_id, attempt, nonce in found.expired:
            try:
                self._expire(job_id, attempt, nonce)
            except (ValueError, KeyError):  # a record that this release cannot read must not stop the others
                log.exception("%s: not taken back", job_id)
        for memory_class_, jobs in found.queues.items():
            missing = min(jobs, MAX_TOKENS) - self._store.tokens(queue_name(memory_class_))
            send_tokens(self._app, [memory_class_] * missing)
        if found.unsized and (self._sizing is None or not self._sizing.is_alive()):
            # A hub that does not answer takes half a minute to say so, and leases end meanwhile: beside the rounds.
            self._sizing = threading.Thread(target=self._size_all, args=(found.unsized,), daemon=True)
            self._sizing.start()

    def _expire(self, job_id: str, attempt: int, nonce: str) -> None:
        """The attempt's worker was silent for a lease: its trainer is dead, the job goes on elsewhere or ends."""
        job = self._store.job(job_id)
        claim = Claim(job_id, attempt, nonce, {}, job.batch, job.failures, job.lease_s)
        silence = f"worker {job.worker} was not heard of for {job.lease_s:g} s"
        if words := self._store.last_words(job_id, attempt):
            silence += f"; its last words: {words}"
        end = after_failure(FailureReason.LOST, silence, job.failures, self._settings.max_failures)
        try:
            send_tokens(self._app, self._store.settle(claim, end, only_expired=True))
        except StaleAttemptError:
            return  # it renewed after all, or another sweeper was quicker
        log.info("%s: attempt %d was lost on %s", job_id, attempt, job.worker)

    def _size_all(self, ids: list[str]) -> None:
        read_config = cache(base_model.read_config)
        for job in self._store.jobs(ids):
            try:
                self._size(job, read_config)
            except ServerError as error:
                log.warning("no estimate: %s", error.what)
            except Exception:
                log.exception("%s: no estimate", job.id)

    def _size(self, job: Job, read_config: Callable[[str, str | None], Mapping[str, Any] | None]) -> None:
        """Estimates the memory of a job whose submitter could not."""
        try:
            spec = PARSE.validate_python(job.spec, strict=False)
        except ValidationError as error:  # of another release, or written by hand
            wrong = f"{error.errors()[0]['msg']} ({'.'.join(map(str, error.errors()[0]['loc']))})"
            send_tokens(self._app, self._store.refuse(job.id, FailureReason.BAD_SPEC, wrong))
            return
        assert not isinstance(spec, ControlSpec)
        config = read_config(spec.base_model, spec.revision)
        try:
            need = estimate(config, spec) if config else base_model.guess_from_size(spec.base_model)
            if spec.resources.memory is None:
                need = int(need * self._store.correction(kind_of(job.spec)))
        except (KeyError, TypeError, LoraqError):
            need = base_model.guess_from_size(spec.base_model)
        send_tokens(self._app, self._store.size(job.id, need, memory_class(need)))
