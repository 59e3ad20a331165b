"""One attempt of a job, from its claim to its settlement."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_worker import guardian
from gpu_worker.journal import Journal
from gpu_worker.pool import TrainerPool
from gpu_worker.protocol import Failed, Progress, Request, Result
from gpu_worker.trainer_process import Ended, LogLine, TrainerProcess
from jobqueue.errors import LoraqError, ServerError, StaleAttemptError, StorageError
from jobqueue.job import Claim, FailureReason, JobState
from jobqueue.retry import decide
from jobqueue.settings import Settings
from jobqueue.storage import Storage, attempt_folder
from jobqueue.store import Settlement, Store

log = logging.getLogger(__name__)
KILL_S = 1.0  # what a guardian may need, at most, from its deadline to the last process' end


class Lease:
    """Renews a claim from a thread of its own, tells the guardian each new deadline, hears of a cancel.

    The deadline that the guardian gets is counted from before the renewal was sent, so that it lies before the
    one that the server keeps: a cut-off trainer is dead before anyone else may claim its job.
    """

    def __init__(self, store: Store, claim: Claim, settings: Settings, claimed_at: float) -> None:
        self._store, self._claim, self._settings = store, claim, settings
        self._margin = min(2 * KILL_S, settings.lease_s / 4)
        self.deadline = claimed_at + settings.lease_s - self._margin
        self.cancelled = threading.Event()
        self.lost = threading.Event()
        self._trainer: TrainerProcess | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease-{claim.job_id}", daemon=True)
        self._thread.start()

    def guard(self, trainer: TrainerProcess) -> None:
        """From now on that trainer lives no longer than the lease."""
        trainer.set_deadline(self.deadline)
        self._trainer = trainer

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
                if guardian.now() > self.deadline:
                    self.lost.set()
                continue
            self.deadline = asked_at + self._settings.lease_s - self._margin
            if self._trainer is not None:
                self._trainer.set_deadline(self.deadline)


class Attempt:
    """Runs a claim to its end: every way out of `run` has settled it, or found that it is not its own any more."""

    def __init__(
        self,
        claim: Claim,
        claimed_at: float,
        store: Store,
        storage: Storage,
        settings: Settings,
        pool: TrainerPool,
        draining: threading.Event,
        wake: Callable[[list[str]], None],
    ) -> None:
        self._claim = claim
        self._store, self._storage, self._settings = store, storage, settings
        self._pool, self._draining, self._wake = pool, draining, wake
        self._lease = Lease(store, claim, settings, claimed_at)
        self._scratch = settings.data_dir / "scratch" / f"{claim.job_id}-{claim.attempt}-{claim.nonce}"

    def run(self) -> None:
        try:
            self._scratch.mkdir(parents=True)
            end = self._end()
            if end is not None:
                self._settle(end)
        except StaleAttemptError as error:
            log.warning("%s; its trainer was ended", error.what)
        finally:
            self._lease.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _end(self) -> Settlement | None:
        """How the attempt ended; None where the job was lost to another."""
        try:
            done = self._storage.published(self._claim.job_id, self._claim.batch)
            if done is not None and done.manifest["spec"] == self._claim.spec:
                # an earlier attempt had finished, and only its word did not arrive
                return Settlement(JobState.SUCCEEDED, outcome=done.manifest["outcome"])
            request = self._request()
            return self._work(request)
        except StorageError as error:
            return self._failure(FailureReason.STORAGE, error.what)
        except LoraqError as error:
            return self._failure(FailureReason.BAD_SPEC, error.what)
        except OSError as error:
            return self._failure(FailureReason.STORAGE, f"{type(error).__name__}: {error}")
        except Exception as error:  # a fault of loraq's own: the job ends with a word, the slot goes on
            log.exception("%s: attempt %d broke", self._claim.job_id, self._claim.attempt)
            return self._failure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")

    def _request(self) -> Request:
        """The job as this machine can do it: sources readable, the adapter in a folder."""
        spec = dict(self._claim.spec)
        section = "data" if spec["kind"] == "train" else "evaluation"
        spec[section] = {**spec[section], "source": self._storage.resolve(spec[section]["source"])}
        for path in (spec["base_model"], spec[section]["source"]):
            self._check_allowed(path)
        adapter = None
        if spec["kind"] == "evaluate" and spec["adapter_job"]:
            trained = self._storage.published(spec["adapter_job"], self._claim.batch)
            if trained is None:
                raise StorageError(f"the adapter of {spec['adapter_job']} is not in the storage {self._storage.url}")
            adapter = str(self._storage.fetch(f"{trained.folder}/adapter", self._scratch / "adapter"))
        output = self._scratch / "output"
        output.mkdir()
        return Request(self._claim.job_id, spec, str(output), adapter)

    def _check_allowed(self, path: str) -> None:
        if not path.startswith("/") or path.startswith(self._storage.address("")):
            return
        if not any(Path(path).resolve().is_relative_to(root) for root in self._settings.model_roots):
            raise LoraqError(f"{path} lies outside the folders that this worker may read (model_roots)")

    def _work(self, request: Request) -> Settlement | None:
        with Journal(self._store, self._claim, self._scratch / "log.txt") as journal:
            trainer = self._pool.take(request.spec["base_model"])
            self._lease.guard(trainer)
            try:
                with contextlib.suppress(BrokenPipeError):  # it has ended: `messages` will say how
                    trainer.send(request)
                end = self._follow(trainer, journal)
            except BaseException:
                trainer.kill()
                raise
            self._pool.give_back(trainer, request.spec["base_model"], clean=isinstance(end, Result) and end.goes_on)
        return self._judge(end, request, journal.last_line)

    def _follow(self, trainer: TrainerProcess, journal: Journal) -> Result | Failed | Ended | JobState:
        """Until the job's end: passes on what the trainer says, and ends it on cancel, drain or loss.

        Returns the trainer's own word, or CANCELLED or QUEUED where it was stopped, or RUNNING where it was lost.
        """
        stopped: JobState | None = None
        end: Result | Failed | None = None
        while True:
            for message in trainer.messages(seconds=0.5):
                if isinstance(message, LogLine):
                    journal.line(message.text)
                elif isinstance(message, Progress):
                    journal.progress(message)
                elif isinstance(message, (Result, Failed)):
                    end = message
                elif isinstance(message, Ended):
                    return stopped or end or message
            if self._lease.lost.is_set():
                trainer.kill()
                return JobState.RUNNING
            if isinstance(end, Result) and stopped is None:
                return end
            wish = JobState.CANCELLED if self._lease.cancelled.is_set() else JobState.QUEUED
            if stopped is None and (self._lease.cancelled.is_set() or self._draining.is_set()):
                stopped = wish
                trainer.stop()
            if isinstance(end, Failed) and stopped is None:
                trainer.kill()  # whatever state it is in, nothing goes on from there
                return end
            journal.flush()

    def _judge(self, end: Result | Failed | Ended | JobState, request: Request, last_line: str) -> Settlement | None:
        if isinstance(end, Result):
            return self._succeed(request, end.outcome)
        if isinstance(end, Failed):
            return self._failure(FailureReason(end.reason), end.message)
        if isinstance(end, Ended):
            return self._failure(FailureReason.CRASHED, f"{end}; its last words: {last_line or 'none'}")
        if end is JobState.CANCELLED:
            return Settlement(JobState.CANCELLED, message="on request")
        if end is JobState.QUEUED:
            return self._failure(FailureReason.PREEMPTED, "the worker was told to stop")
        return None

    def _succeed(self, request: Request, outcome: dict[str, Any]) -> Settlement:
        output = Path(request.output)
        shutil.copy(self._scratch / "log.txt", output / "log.txt")
        folder = attempt_folder(self._claim)
        outcome = {**outcome, "folder": folder}
        manifest = {
            "job": self._claim.job_id,
            "attempt": self._claim.attempt,
            "spec": self._claim.spec,
            "outcome": outcome,
            "published_at": time.time(),
        }
        self._storage.publish(output, folder, manifest)
        return Settlement(JobState.SUCCEEDED, outcome=outcome)

    def _failure(self, reason: FailureReason, message: str) -> Settlement:
        decision = decide(reason, self._claim.failures, self._settings.max_failures)
        return Settlement(
            state=JobState.QUEUED if decision.again else JobState.FAILED,
            reason=reason,
            message=message,
            delay_s=decision.delay_s,
            counts=decision.counts,
        )

    def _settle(self, end: Settlement) -> None:
        """Until the server has taken it, or given the job to another. Raises StaleAttemptError."""
        while True:
            try:
                self._wake(self._store.settle(self._claim, end))
                log.info("%s: attempt %d %s %s", self._claim.job_id, self._claim.attempt, end.state, end.message)
                return
            except ServerError as error:
                log.warning("%s: not settled yet: %s", self._claim.job_id, error.what)
                if self._draining.wait(self._settings.renew_s) and guardian.now() > self._lease.deadline:
                    return  # the worker has to go; the sweeper, and the manifest, will speak for the attempt
