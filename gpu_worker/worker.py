"""One device's worker: claims what fits beside what it runs already, and runs it."""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from dataclasses import asdict
from functools import cache, partial
from importlib.util import find_spec
from typing import Literal

from gpu_worker import guardian
from gpu_worker.admission import Admission
from gpu_worker.attempt import Attempt
from gpu_worker.control_attempt import ControlAttempt
from gpu_worker.gpu import Device
from gpu_worker.health import watch
from gpu_worker.identity import boot, identity
from gpu_worker.lease import Lease
from gpu_worker.mps import mps_of
from gpu_worker.pause import Pause
from gpu_worker.pool import TrainerPool
from gpu_worker.sole import hold
from gpu_worker.storage_watch import StorageWatch
from gpu_worker.trainer_process import trainer_environment, worker_cache
from jobqueue.broker import make_app, send_tokens
from jobqueue.errors import MachineError, ServerError, StaleAttemptError
from jobqueue.job import Claim, FailureReason, JobKind, JobState, Settlement
from jobqueue.memory import CONTEXT, GIB, PREVIEW, classes_for
from jobqueue.settings import Settings
from jobqueue.storage import Storage
from jobqueue.store import Store

log = logging.getLogger(__name__)


class Worker:
    """Serves one device: claims what fits, one job per slot at a time, until it is told to drain.

    Args:
        slots: how many jobs run side by side at most; their memory must fit as well.
        spares: how many trainers stand ready for a job that is to come.
        share: how they share a GPU, see `mps_of`.

    Raises MachineError where it is to be shared in a way that this machine has not, another worker serves it, or its
    folder cannot be written.
    """

    def __init__(
        self,
        device: Device,
        settings: Settings,
        url: str,
        slots: int = 1,
        spares: int = 0,
        share: Literal["auto", "mps", "timeslice", "off"] = "timeslice",
    ) -> None:
        self.device, self.settings, self.slots = device, settings, slots
        self.leaving = threading.Event()  # this process is to end
        self.drained = threading.Event()  # somebody wants this worker to take nothing; it stays
        self.store = Store(url, timeout_s=settings.timeout_s)
        self.app = make_app(url, settings.timeout_s)
        self.storage = Storage(settings.storage_url)
        cache = worker_cache(settings.data_dir, device)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            if device.kind != "control":  # which several of a host share: it has neither memory to promise nor scratch
                self._sole = hold(cache, device.label)
            self.id, self._boot = identity(cache, device), boot()
        except OSError as error:
            raise MachineError(
                f"cannot write in {cache}: {error.strerror}",
                "Set LORAQ_DATA_DIR to a folder that this user can write in.",
            ) from None
        shutil.rmtree(cache / "scratch", ignore_errors=True)  # of attempts that ended with kill -9
        self._admission, self._spares = Admission(slots, spares * CONTEXT), spares
        self._mps, self._share = mps_of(device, cache, share, slots), share
        self.pool = TrainerPool(
            trainer_environment(device.kind, cache),
            cache,
            settings.grace_s,
            settings.trainer_command,
            spares,
            self._may_rest,
            self._mps,
        )
        self._slots = threading.BoundedSemaphore(slots)
        self._running: dict[str, str] = {}  # nonce -> job
        self._unanswered: list[str] = []  # nonces of claims that may have been given
        self._pause = Pause()
        self._storage_watch = StorageWatch(self.storage, cache)
        self._watch = watch(device, cache, alive=lambda: bool(self._running or self.pool.resting))

    @property
    def classes(self) -> list[str]:
        """The memory classes whose wake-ups it listens to."""
        if self.device.kind == "gpu":
            return classes_for(self._watch.health.usable_bytes)
        return [self.device.kind, *([PREVIEW] if self.device.kind == "control" and _can_preview() else [])]

    def well(self) -> bool:
        return not (self._storage_watch.problem or self._watch.health.sick or self._pause.why)

    def draining(self) -> bool:
        return self.leaving.is_set() or self.drained.is_set()

    def note(self) -> str:
        """Why it takes no job, where that is so."""
        if self.drained.is_set():
            return "drained"
        if problem := self._storage_watch.problem:
            return f"sick: {problem}"
        if why := self._pause.why:
            return f"it pauses: {why}"
        return self._watch.health.note

    def work(self, *, wait: bool) -> None:
        """Claims until it is refused. With `wait`, a slot that is busy is waited for, else left alone."""
        if not self._slots.acquire(blocking=wait):
            return
        try:
            while not self.draining() and self.well() and self._work_once():
                pass
        finally:
            self._slots.release()

    def _work_once(self) -> bool:
        """One claim and its job; False where there was none, or the server is away."""
        with self._admission.claiming:
            claimed_at = guardian.now()
            claim = None if self.draining() else self._claim()
        if claim is None:
            return False
        log.info("%s: attempt %d begins", claim.job_id, claim.attempt)
        self._running[claim.nonce], hindered = claim.job_id, ""
        try:
            self._run(claim, claimed_at)
        except MachineError as error:  # nothing of it has begun: the claim is given back
            hindered = error.what
        except Exception:  # nothing that a job does may end its worker; the lease ends the job
            log.exception("%s: attempt %d broke its slot", claim.job_id, claim.attempt)
            self._spoilt("an attempt broke its slot")
        finally:
            self._running.pop(claim.nonce)
            self._admission.release(claim.nonce)
        if hindered:  # only now: another slot may take the claim at once, and is promised memory by the same nonce
            self._unanswered.append(claim.nonce)
            self._spoilt(hindered)
        return True

    def _claim(self) -> Claim | None:
        """The best job that fits into what is left; its memory is promised to it."""
        health = self._watch.look()
        if health.sick:
            return None
        nonce = self._unanswered.pop() if self._unanswered else secrets.token_hex(8)
        usable = health.usable_bytes
        try:
            claim = self.store.claim(
                self.id,
                self.device.kind,
                self._admission.room(usable),
                self.settings.lease_s,
                nonce,
                self.classes,
                whole_bytes=usable,
            )
        except ServerError as error:
            log.warning("no claim: %s", error.what)
            self._unanswered.append(nonce)  # a claim whose answer was lost is asked for again
            return None
        if claim is not None and self.device.kind != "control":
            granted = self._admission.admit(claim.nonce, claim.need_bytes, usable)
            log.info("%s: %.1f GiB of %.1f GiB are its own", claim.job_id, granted / GIB, usable / GIB)
        return claim

    def tend(self) -> None:
        """Looks after the trainers that rest, and after claims that nobody works on."""
        if self._mps:
            self._mps.tend()
        if self.well() and not self.draining():
            self.pool.tend()
        else:  # a resting trainer keeps a sick card from being reset
            self.pool.close()
            self._return_unanswered()

    def _return_unanswered(self) -> None:
        """A claim whose answer was lost may have been given; its job goes back, since nothing is claimed here now."""
        with self._admission.claiming:
            nonces, self._unanswered = self._unanswered, []
        for nonce in nonces:
            try:
                if claim := self.store.claim_again(self.id, self.settings.lease_s, nonce):
                    end = Settlement(JobState.QUEUED, FailureReason.PREEMPTED, "its worker takes no job now")
                    send_tokens(self.app, self.store.settle(claim, end))
            except ServerError as error:
                log.warning("a claim may be nobody's: %s", error.what)
                self._unanswered.append(nonce)
            except StaleAttemptError:  # its lease has ended
                pass

    def _may_rest(self) -> int:
        """Trainers: one for each slot without and the spares, as far as there is memory for them.

        That is what nobody was promised, and a context's in the promise of each job without a trainer: its data are
        still copied, and it will take one that rests; or its result is still written, and the one that it had rests.
        """
        wanted = self.slots - self.pool.at_work + self._spares
        if self.device.kind != "gpu":
            return wanted
        if self._mps and self._mps.unsure:  # its server takes no client until all that it had are gone
            return 0
        without = self._admission.jobs - self.pool.at_work
        return min(wanted, self._admission.room(self._watch.health.usable_bytes) // CONTEXT + without)

    def _run(self, claim: Claim, claimed_at: float) -> None:
        wake = partial(send_tokens, self.app)
        if claim.spec["kind"] not in set(JobKind):
            self._refuse(claim, claimed_at)
            return
        if JobKind(claim.spec["kind"]).control:
            ControlAttempt(
                claim,
                claimed_at,
                self.store,
                self.storage,
                self.settings,
                self.pool.folder,
                self.leaving,
                self.draining,
                wake,
            ).run()
            return
        attempt = Attempt(
            claim,
            claimed_at,
            self.store,
            self.storage,
            self.settings,
            self.pool,
            self._watch,
            self._admission,
            self.leaving,
            self.draining,
            wake,
        )
        attempt.run()
        if attempt.sick:
            self._spoilt(attempt.sick)
        elif attempt.succeeded:  # how else it ended says nothing of this host
            self._pause.end()

    def _refuse(self, claim: Claim, claimed_at: float) -> None:
        """A job of a newer release: it would be run by nobody, and taken back by no sweeper of this one."""
        unknown = f"the release of {self.id.partition('#')[0]} knows no jobs of the kind {claim.spec['kind']!r}"
        lease = Lease(self.store, claim, self.settings, claimed_at, self.leaving)
        try:
            send_tokens(self.app, lease.settle(Settlement(JobState.FAILED, FailureReason.BAD_SPEC, unknown)))
        except StaleAttemptError as error:
            log.warning("%s", error.what)
        finally:
            lease.close()

    def _spoilt(self, why: str) -> None:
        """By this host, not by its job, an attempt has failed."""
        if seconds := self._pause.begin(why):
            self._storage_watch.try_again()
            log.warning("nothing is claimed for %g s: %s", seconds, why)

    def info(self) -> dict[str, object]:
        """What the store is told of it, the fields of WorkerInfo."""
        return {
            "host": self.id.partition("/")[0],  # by which it is drained, whatever the machine is called by now
            "boot": self._boot,
            "device": self.device.name,
            "uuid": self.device.uuid,
            "usable_bytes": self._watch.health.usable_bytes,
            "slots": self.slots,
            "share": self.share,
            "running": sorted(self._running.values()),
            "note": self.note(),
            "takes_jobs": self.well() and not self.draining(),
            "every_s": self.settings.heartbeat_s,
            "promised_bytes": self._admission.promised,
            **asdict(self._watch.load),
            "spares": self.pool.spares,
            "storage_writable": not self._storage_watch.problem,
        }

    @property
    def share(self) -> str:
        """How its jobs share the GPU, for the list of workers."""
        if self._mps:
            return "mps, which recovers" if self._mps.unsure else "mps"
        return "" if self.device.kind != "gpu" else "off" if self._share == "off" else "timeslice"

    @property
    def idle_slots(self) -> int:
        return self.slots - len(self._running)

    def leave(self) -> None:
        """Waits for what runs, ends the resting trainers, and tells the store."""
        for _ in range(self.slots):
            self._slots.acquire()
        self.pool.close()
        if self._mps:
            self._mps.close()
        self._return_unanswered()
        try:
            self.store.leave(self.id)
        except ServerError as error:
            log.warning("left without a word: %s", error.what)


@cache
def _can_preview() -> bool:
    """Whether this host has what it takes: `loraq[control]` alone has not."""
    return find_spec("tokenizers") is not None and find_spec("datasets") is not None
