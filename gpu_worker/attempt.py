"""One attempt of a job, from its claim to its settlement."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

from gpu_worker.admission import Admission, grown
from gpu_worker.checkpoints import CheckpointKeeper
from gpu_worker.confine import check_source
from gpu_worker.health import Watch
from gpu_worker.journal import Journal
from gpu_worker.lease import Lease
from gpu_worker.patience import Patience
from gpu_worker.pool import TrainerPool
from gpu_worker.protocol import Checkpoint, Failed, Progress, Request, Result
from gpu_worker.stop import ON_REQUEST, Stop, Stopped
from gpu_worker.trainer_process import Ended, LogLine, TrainerProcess
from jobqueue import adapters
from jobqueue.adapters import STORED
from jobqueue.errors import LoraqError, ServerError, StaleAttemptError, StorageError
from jobqueue.job import Claim, FailureReason, JobState, Settlement
from jobqueue.memory import CONTEXT, GIB, kind_of
from jobqueue.retry import after_failure
from jobqueue.settings import Settings
from jobqueue.storage import Published, Storage, attempt_folder
from jobqueue.store import Store

log = logging.getLogger(__name__)


class Lost(Enum):
    """The lease was lost: the job is another's, or nobody's, to end."""

    LOST = "lost"


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
        watch: Watch,
        admission: Admission,
        leaving: threading.Event,
        draining: Callable[[], bool],
        wake: Callable[[list[str]], None],
    ) -> None:
        self._claim = claim
        self._store, self._storage, self._settings = store, storage, settings
        self._pool, self._watch, self._admission = pool, watch, admission
        self._leaving, self._draining, self._wake = leaving, draining, wake
        self._lease = Lease(store, claim, settings, claimed_at)
        self._patience = Patience(self._lease, settings, leaving)
        self._scratch = pool.folder / "scratch" / f"{claim.job_id}-{claim.attempt}-{claim.nonce}"
        keep = claim.spec.get("training", {}).get("save_total_limit", 2)
        self._keeper = CheckpointKeeper(storage, claim, keep)
        self._budget = admission.budget(claim.nonce) if watch.limits else None
        self.sick = ""  # why this host, and not the job, is to blame for how it ended
        self.succeeded = False

    def run(self) -> None:
        try:
            end = self._end()
            if end is not None:
                self.sick = end.message if end.reason == FailureReason.STORAGE else ""
                self.succeeded = end.state is JobState.SUCCEEDED
                self._wake(self._lease.settle(end, self._leaving))
                if end.state in (JobState.SUCCEEDED, JobState.CANCELLED):
                    self._patience("remove checkpoints", self._keeper.forget, settled=True, hurry=True)
        except StaleAttemptError as error:
            log.warning("%s; its trainer was ended", error.what)
        except StorageError as error:
            log.warning("%s: its checkpoints stay: %s", self._claim.job_id, error.what)
        finally:
            self._lease.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _end(self) -> Settlement | None:
        """How the attempt ended; None where the job was lost to another."""
        try:
            self._scratch.mkdir(parents=True)
            done = self._patience("look for an earlier result", self._published)
            if done is not None:  # an earlier attempt had finished, and only its word did not arrive
                return Settlement(JobState.SUCCEEDED, outcome=done.manifest["outcome"])
            request = self._request()
            return self._work(request)
        except StaleAttemptError:
            raise
        except StorageError as error:
            if self._lease.cancelled.is_set():
                return Settlement(JobState.CANCELLED, message=ON_REQUEST)
            return self._failure(FailureReason.STORAGE, error.what)
        except LoraqError as error:
            return self._failure(FailureReason.BAD_SPEC, error.what)
        except OSError as error:
            log.exception("%s: attempt %d: a disk or a pipe failed", self._claim.job_id, self._claim.attempt)
            return self._failure(FailureReason.STORAGE, f"{type(error).__name__}: {error}")
        except Exception as error:  # a fault of loraq's own: the job ends with a word, the slot goes on
            log.exception("%s: attempt %d broke", self._claim.job_id, self._claim.attempt)
            return self._failure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")

    def _published(self) -> Published | None:
        return self._storage.published(self._claim.job_id, self._claim.batch, self._claim.submission)

    def _request(self) -> Request:
        """The job as this machine can do it: what lies in the storage is copied, no trainer waits for a mount."""
        spec = dict(self._claim.spec)
        section = "evaluation" if spec["kind"] == "evaluate" else "data"
        data = spec[section] or {}  # an export may ask the user's own prompts
        replay = data.get("replay")
        read = [spec["base_model"], spec.get("from_adapter"), data.get("source"), replay and replay["source"]]
        for source in filter(None, read):
            check_source(source, self._settings.model_roots)
        if data:
            spec[section] = self._copied(data, "data") | ({"replay": self._copied(replay, "replay")} if replay else {})
        adapter = resume = None
        if spec["kind"] == "train":
            resume = self._patience("read a checkpoint", lambda: self._keeper.newest(self._scratch))
            adapter = self._adapter(spec["from_adapter"]) if spec.get("from_adapter") else None
        elif spec["adapter_job"]:
            trained = self._lease.insist(lambda: self._store.job(spec["adapter_job"])).outcome["folder"]
            adapter = self._adapter(f"{STORED}{trained}/adapter")
        output = self._scratch / "output"
        output.mkdir()
        return Request(
            self._claim.job_id,
            spec,
            str(output),
            adapter,
            resume,
            self._claim.rung,
            self._budget,
            self._lease.insist(lambda: self._store.correction(kind_of(spec))),
            any(end["reason"] == FailureReason.OUT_OF_MEMORY for end in self._before()),
            str(converter) if (converter := self._settings.gguf_converter) else None,
        )

    def _copied(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        folder = self._scratch / name
        source = self._patience("read the data", lambda: self._storage.fetch_source(data["source"], folder))
        return {**data, "source": source}

    def _adapter(self, source: str) -> str:
        """As a folder of this machine, or a hub id."""
        folder = self._scratch / "adapter"
        if source.startswith(STORED):
            stored = source.removeprefix(STORED)
            return str(self._patience("read the adapter", lambda: self._storage.fetch(stored, folder)))
        if "://" in source:
            return str(self._patience("read the adapter", lambda: adapters.download(source, folder)))
        return source

    def _work(self, request: Request) -> Settlement | None:
        with Journal(self._store, self._claim, self._scratch / "log.txt") as journal:
            try:
                trainer, end = self._hand_over(request, journal)
            finally:
                self._finish_checkpoints()
            self._lease.release()
            self._pool.give_back(trainer, request.spec["base_model"], clean=isinstance(end, Result) and end.goes_on)
            stays = self._watch.freed(trainer.mark, self._settings.grace_s) if trainer.ended else 0
        if not isinstance(end, (Result, Lost)):
            self._keep_log()
        settlement = self._judge(end, request, list(journal.last_lines))
        if settlement is not None and stays:
            said = f"{stays / GIB:.1f} GiB of the GPU's memory did not come back"
            settlement = replace(settlement, message="; ".join(filter(None, (settlement.message, said))))
        if settlement is not None and settlement.outcome is None and journal.last_lines:
            settlement = replace(settlement, outcome={"last_lines": list(journal.last_lines)})
        return settlement

    def _hand_over(
        self, request: Request, journal: Journal
    ) -> tuple[TrainerProcess, Result | Failed | Ended | Stopped | Lost]:
        """The request to a trainer, and how that ends. One that had died at rest is no fault of the job's."""
        while True:
            trainer = self._pool.take(request.spec["base_model"])
            self._lease.guard(trainer)
            try:
                with contextlib.suppress(BrokenPipeError):  # it has ended: `messages` will say how
                    trainer.send(request)
                end = self._follow(trainer, journal)
            except BaseException:
                self._pool.give_back(trainer, request.spec["base_model"], clean=False)
                raise
            if not (isinstance(end, Ended) and trainer.rested and journal.silent) or self._lease.overran:
                return trainer, end
            self._pool.give_back(trainer, request.spec["base_model"], clean=False)

    def _finish_checkpoints(self) -> None:
        try:
            self._patience("finish a checkpoint", self._keeper.finish, hurry=True)
        except (StorageError, StaleAttemptError) as error:
            self._keeper.give_up()
            log.warning("%s: a checkpoint is given up: %s", self._claim.job_id, error.what)

    def _keep_log(self) -> None:
        """Of an attempt that leaves nothing else behind."""
        try:
            text = (self._scratch / "log.txt").read_text(encoding="utf-8")
            name = f"{attempt_folder(self._claim)}/log.txt"
            self._patience("keep the log", lambda: self._storage.write_text(name, text), hurry=True)
        except (StorageError, OSError) as error:
            log.warning("%s: its log is not kept: %s", self._claim.job_id, error)

    def _follow(self, trainer: TrainerProcess, journal: Journal) -> Result | Failed | Ended | Stopped | Lost:
        """Until the job's end: passes on what the trainer says, and ends it where that is due."""
        end: Result | Failed | None = None
        timeout_minutes = self._claim.spec["resources"].get("timeout_minutes")
        stop = Stop(self._lease, self._draining, self._keeper, trainer, self._watch, self._settings, timeout_minutes)
        while True:
            for message in trainer.messages(seconds=0.5):
                stop.heard_at = time.monotonic()
                if isinstance(message, LogLine):
                    journal.line(message.text)
                elif isinstance(message, Progress):
                    journal.progress(message)
                    if message.budget_bytes is not None:
                        self._admission.lower(self._claim.nonce, message.budget_bytes)
                    stop.can_save = message.phase == "train"
                elif isinstance(message, Checkpoint):
                    self._keeper.take(message)
                elif isinstance(message, (Result, Failed)):
                    end = message
                elif isinstance(message, Ended):  # a result that came while it was told to stop is still a result
                    return end if isinstance(end, Result) else stop.begun or end or message
            if self._lease.lost.is_set():
                trainer.kill()
                return Lost.LOST
            if end is not None and stop.begun is None:
                if isinstance(end, Failed):
                    trainer.kill()  # whatever state it is in, nothing goes on from there
                return end
            while not self._keeper.said.empty():
                journal.line(self._keeper.said.get())
            stop.look()
            journal.flush()

    def _judge(
        self, end: Result | Failed | Ended | Stopped | Lost, request: Request, last_lines: list[str]
    ) -> Settlement | None:
        match end:
            case Result():
                return self._succeed(request, end.outcome)
            case Failed(reason=FailureReason.INTERNAL) | Ended() if sick := self._watch.look().sick:
                return self._failure(FailureReason.DEVICE, f"the GPU failed: {sick}")
            case Failed(reason=FailureReason.OUT_OF_MEMORY) if taken := self._taken():
                return self._failure(FailureReason.DEVICE, f"memory ran out: {taken}")
            case Failed(reason=FailureReason.OUT_OF_MEMORY):
                return self._without_memory(end)
            case Failed():
                return self._failure(FailureReason(end.reason), end.message)
            case Ended() if self._lease.overran:  # it was the guardian, and not the trainer's fault
                return self._failure(FailureReason.LOST, "its worker was cut off from the server and ended the trainer")
            case Ended():
                return self._failure(FailureReason.CRASHED, f"{end}; its last words: {(last_lines or ['none'])[-1]}")
            case Stopped(reason=None):
                return Settlement(JobState.CANCELLED, message=end.message)
            case Stopped(reason=reason) if reason is not None:
                return self._failure(reason, end.message)
        return None

    def _succeed(self, request: Request, outcome: dict[str, Any]) -> Settlement:
        output = Path(request.output)
        shutil.copy(self._scratch / "log.txt", output / "log.txt")
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
        self._patience("write the result", lambda: self._storage.publish(output, folder, manifest))
        self._learn(outcome, request.correction)
        return Settlement(JobState.SUCCEEDED, outcome=outcome)

    def _without_memory(self, end: Failed) -> Settlement:
        """Smaller micro-batches next time; where there are none, more memory, if this device or one of another worker
        has more than the job was given; else the job has failed."""
        again = self._failure(FailureReason.OUT_OF_MEMORY, end.message)
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

    def _before(self) -> list[dict[str, Any]]:
        """The job's attempts before this one, oldest first."""
        return self._lease.insist(lambda: self._store.job(self._claim.job_id)).history

    def _failure(self, reason: FailureReason, message: str) -> Settlement:
        in_a_row = 1
        if reason is FailureReason.DEVICE:
            in_a_row += sum(1 for _ in takewhile(lambda end: end["reason"] == reason, reversed(self._before())))
        return after_failure(reason, message, self._claim.failures, self._settings.max_failures, in_a_row=in_a_row)
