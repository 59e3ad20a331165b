"""One attempt of a job, from its claim to its settlement."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from gpu_worker.admission import Admission
from gpu_worker.checkpoints import CheckpointKeeper
from gpu_worker.conclusion import Conclusion, End
from gpu_worker.confine import check_source
from gpu_worker.health import Watch
from gpu_worker.journal import Journal
from gpu_worker.lease import Lease
from gpu_worker.pace import Pace
from gpu_worker.patience import DrainedError, Patience
from gpu_worker.pool import TrainerPool
from gpu_worker.protocol import Answer, Checkpoint, Failed, Progress, Request, Result
from gpu_worker.stop import CUT_OFF, ON_REQUEST, TOLD_TO_STOP, Stop, Stopped
from gpu_worker.trainer_process import Ended, LogLine, TrainerProcess
from jobqueue import adapters, ensembles
from jobqueue.adapters import STORED
from jobqueue.archive import Lookup
from jobqueue.errors import ArchivedError, LoraqError, StaleAttemptError, StorageError
from jobqueue.job import Claim, FailureReason, Job, JobState, Settlement
from jobqueue.memory import CONTEXT, GIB, kind_of
from jobqueue.settings import Settings
from jobqueue.storage import Published, Storage, attempt_folder
from jobqueue.store import Store

log = logging.getLogger(__name__)
MAY_HARM_OTHERS = {FailureReason.DEVICE, FailureReason.INTERNAL, FailureReason.CRASHED}


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
        self._scratch = pool.folder / "scratch" / f"{claim.job_id}-{claim.attempt}-{claim.nonce}"
        keep = claim.spec.get("training", {}).get("save_total_limit", 2)
        self._keeper = CheckpointKeeper(storage, claim, keep)
        self._budget = admission.budget(claim.nonce) if watch.limits else None
        self._log = self._scratch / "log.txt"
        self._lease = Lease(store, claim, settings, claimed_at, leaving)  # the last that may fail: `run` closes it
        self._patience = Patience(self._lease, settings, leaving.is_set)
        self._read = Patience(self._lease, settings, leaving.is_set, draining)  # before there is a trainer
        self._conclusion = Conclusion(
            claim, store, storage, settings, self._lease, self._patience, watch, self._budget, self._log
        )
        self.sick = ""  # why this host, and not the job, is to blame for how it ended
        self.succeeded = False

    def run(self) -> None:
        try:
            end = self._end()
            self.sick = end.message if end.reason == FailureReason.STORAGE else ""
            self.succeeded = end.state is JobState.SUCCEEDED
            self._wake(self._lease.settle(end))
            if self._claim.leaves_files and self.succeeded:  # whatever else ended may be retried
                self._patience("remove checkpoints", self._keeper.forget, settled=True)
        except StaleAttemptError as error:
            log.warning("%s; its trainer was ended", error.what)
        except StorageError as error:
            log.warning("%s: its checkpoints stay: %s", self._claim.job_id, error.what)
        finally:
            self._lease.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _end(self) -> Settlement:
        """How the attempt ended. Raises StaleAttemptError where the job was lost to another."""
        try:
            self._scratch.mkdir(parents=True)
            done = self._read("look for an earlier result", self._published)
            if done is not None:  # an earlier attempt had finished, and only its word did not arrive
                return Settlement(JobState.SUCCEEDED, outcome=done.manifest["outcome"])
            self._conclusion.before = self._lease.insist(lambda: self._store.job(self._claim.job_id)).history
            return self._work(self._request())
        except StaleAttemptError:
            raise
        except DrainedError:
            return self._conclusion.failure(FailureReason.PREEMPTED, TOLD_TO_STOP)
        except StorageError as error:
            if self._lease.cancelled.is_set():
                return Settlement(JobState.CANCELLED, message=ON_REQUEST)
            if self._leaving.is_set():  # perhaps it had too little time
                return self._conclusion.failure(FailureReason.PREEMPTED, f"{TOLD_TO_STOP}: {error.what}")
            return self._conclusion.failure(FailureReason.STORAGE, error.what)
        except LoraqError as error:
            return self._conclusion.failure(FailureReason.BAD_SPEC, error.what)
        except OSError as error:
            log.exception("%s: attempt %d: a disk or a pipe failed", self._claim.job_id, self._claim.attempt)
            return self._conclusion.failure(FailureReason.STORAGE, f"{type(error).__name__}: {error}")
        except Exception as error:  # a fault of loraq's own: the job ends with a word, the slot goes on
            log.exception("%s: attempt %d broke", self._claim.job_id, self._claim.attempt)
            return self._conclusion.failure(FailureReason.INTERNAL, f"{type(error).__name__}: {error}")

    def _published(self) -> Published | None:
        if not self._claim.leaves_files:
            return None
        return self._storage.published(self._claim.job_id, self._claim.batch, self._claim.submission)

    def _job(self, job_id: str) -> Job:
        """Another job; its batch may have been archived."""
        try:
            return self._lease.insist(lambda: self._store.job(job_id))
        except ArchivedError:
            lookup = Lookup(self._store, lambda: self._storage)
            return self._read("read the archive", lambda: self._lease.insist(lambda: lookup.job(job_id)))

    def _request(self) -> Request:
        """The job as this machine can do it: what lies in the storage is copied, no trainer waits for a mount."""
        spec = dict(self._claim.spec)
        section = next((name for name in ("data", "evaluation") if name in spec), "")
        rows = spec.get(section) or {}  # a question reads none, and an export may ask the user's own prompts
        replay = rows.get("replay")
        read = [spec["base_model"], spec.get("from_adapter"), rows.get("source"), replay and replay["source"]]
        for source in filter(None, read):
            check_source(source, self._settings.model_roots)
        if rows:
            spec[section] = self._copied(rows, "data") | ({"replay": self._copied(replay, "replay")} if replay else {})
        if ewc := spec.get("ewc"):
            check_source(ewc["data"]["source"], self._settings.model_roots)
            spec["ewc"] = ewc | {"data": self._copied(ewc["data"], "ewc")}
        adapter = resume = None
        members: tuple[str, ...] = ()
        if spec["kind"] == "train":
            resume = self._read("read a checkpoint", lambda: self._keeper.newest(self._scratch))
        if spec.get("from_adapter"):
            adapter = self._adapter(spec["from_adapter"])
        elif spec.get("members"):
            members = self._members(spec["members"])
        elif spec.get("adapter_job") and "adapter" in spec.get("asked", ("adapter",)):
            trained = self._job(spec["adapter_job"]).outcome["folder"]
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
            any(end["reason"] == FailureReason.OUT_OF_MEMORY for end in self._conclusion.before),
            str(converter) if (converter := self._settings.gguf_converter) else None,
            members,
        )

    def _copied(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        folder = self._scratch / name
        source = self._read("read the data", lambda: self._storage.fetch_source(data["source"], folder))
        return {**data, "source": source}

    def _members(self, members: dict[str, Any]) -> tuple[str, ...]:
        """The adapters of an ensemble. Raises LoraqError where too few of its trials have succeeded."""
        trains = self._lease.insist(lambda: self._store.jobs(members["trains"]))
        try:
            chosen = ensembles.chosen(trains, members["best"])
        except ValueError as error:
            raise LoraqError(f"{members['name']}: {error}") from None
        adapters = [f"{STORED}{train.outcome['folder']}/adapter" for train in chosen]
        return tuple(self._adapter(adapter, f"adapter-{number}") for number, adapter in enumerate(adapters))

    def _adapter(self, source: str, name: str = "adapter") -> str:
        """As a folder of this machine, or a hub id."""
        folder = self._scratch / name
        if source.startswith(STORED):
            stored = source.removeprefix(STORED)
            return str(self._read("read the adapter", lambda: self._storage.fetch(stored, folder)))
        if "://" in source:
            return str(self._read("read the adapter", lambda: adapters.download(source, folder)))
        return source

    def _work(self, request: Request) -> Settlement:
        with Journal(self._store, self._claim, self._log) as journal:
            try:
                trainer, end = self._hand_over(request, journal)
            finally:
                self._finish_checkpoints()
            self._lease.release()
            self._pool.give_back(trainer, request.spec["base_model"], clean=isinstance(end, Result) and end.goes_on)
            stays = self._watch.freed(trainer.mark, self._settings.grace_s) if trainer.ended else 0
        if self._claim.leaves_files and not isinstance(end, Result):
            self._keep_log()
        settlement = self._conclusion.after(end, request, list(journal.last_lines))
        if stays:
            said = f"{stays / GIB:.1f} GiB of the GPU's memory did not come back"
            settlement = replace(settlement, message="; ".join(filter(None, (settlement.message, said))))
        if settlement.outcome is None and journal.last_lines:
            settlement = replace(settlement, outcome={"last_lines": list(journal.last_lines)})
        return settlement

    def _hand_over(self, request: Request, journal: Journal) -> tuple[TrainerProcess, End]:
        """The request to a trainer, and how that ends. One that had died at rest is no fault of the job's."""
        while True:
            trainer = self._pool.take(request.spec["base_model"], alone=self._alone())
            self._lease.guard(trainer)
            try:
                with contextlib.suppress(BrokenPipeError):  # it has ended: `messages` will say how
                    trainer.send(request)
                end = self._follow(trainer, journal)
            except BaseException:
                self._pool.give_back(trainer, request.spec["base_model"], clean=False)
                raise
            if not (isinstance(end, Ended) and trainer.rested and journal.silent):
                return trainer, self._excused(trainer, end, journal)
            self._pool.give_back(trainer, request.spec["base_model"], clean=False)

    def _excused(self, trainer: TrainerProcess, end: End, journal: Journal) -> End:
        """How it ended, unless MPS is to blame."""
        mps = self._pool.mps if trainer.in_mps else None
        match end:
            case Failed(reason=FailureReason.INTERNAL, message=said):
                pass
            case Ended():
                said = " ".join(journal.last_lines)
            case _:
                return end
        excuse = mps and mps.excuse(trainer, said)
        return Stopped(FailureReason.DEVICE, excuse) if excuse else end

    def _alone(self) -> bool:
        """Whether this attempt is kept away from MPS: what it may do to others there, and they to it, has happened."""
        failed = {end["reason"] for end in self._conclusion.before} & MAY_HARM_OTHERS
        return self._pool.mps is not None and (bool(failed) or self._pool.mps.unsure)

    def _finish_checkpoints(self) -> None:
        try:
            self._patience("finish a checkpoint", self._keeper.finish)
        except (StorageError, StaleAttemptError) as error:
            self._keeper.give_up()
            log.warning("%s: a checkpoint is given up: %s", self._claim.job_id, error.what)

    def _keep_log(self) -> None:
        """Of an attempt that leaves nothing else behind."""
        try:
            text = self._log.read_text(encoding="utf-8")
            name = f"{attempt_folder(self._claim)}/log.txt"
            self._patience("keep the log", lambda: self._storage.write_text(name, text))
        except (StorageError, OSError) as error:
            log.warning("%s: its log is not kept: %s", self._claim.job_id, error)

    def _follow(self, trainer: TrainerProcess, journal: Journal) -> End:
        """Until the job's end: passes on what the trainer says, and ends it where that is due."""
        end: Result | Failed | None = None
        timeout_minutes = self._claim.spec["resources"].get("timeout_minutes")
        mps = self._pool.mps if trainer.in_mps else None
        stop = Stop(
            self._lease, self._draining, self._keeper, trainer, self._watch, self._settings, timeout_minutes, mps
        )
        context_bytes = CONTEXT if self._watch.limits else 0
        pace = Pace(partial(self._admission.budget, self._claim.nonce), context_bytes)
        while True:
            for message in trainer.messages(seconds=0.5):
                stop.heard_at = time.monotonic()
                if isinstance(message, LogLine):
                    journal.line(message.text)
                elif isinstance(message, Progress):
                    if message.budget_bytes is not None:
                        self._admission.lower(self._claim.nonce, message.budget_bytes)
                    journal.event(pace.seen(message, time.monotonic()))
                    stop.can_save = message.phase == "train"
                elif isinstance(message, Answer):
                    journal.event(message)
                elif isinstance(message, Checkpoint):
                    self._keeper.take(message)
                elif isinstance(message, (Result, Failed)):
                    end = message
                elif isinstance(message, Ended):  # a result that came while it was told to stop is still a result
                    cut_off = CUT_OFF if self._lease.overran else None
                    return end if isinstance(end, Result) else stop.begun or end or cut_off or message
            if self._lease.lost.is_set():
                raise StaleAttemptError(f"{self._claim.job_id}: attempt {self._claim.attempt} lost its lease")
            if end is not None and stop.begun is None:
                if isinstance(end, Failed):
                    trainer.kill()  # whatever state it is in, nothing goes on from there
                return end
            while not self._keeper.said.empty():
                journal.line(self._keeper.said.get())
            stop.look()
            journal.flush()
            if stop.begun is not None and stop.overdue:
                trainer.kill()
                return end if isinstance(end, Result) else stop.begun
