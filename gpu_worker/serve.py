"""One Celery process for one device, or for the host's control work. Started by `gpu_worker.main`, already pinned."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial

from celery.exceptions import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down

from gpu_worker import guardian
from gpu_worker.attempt import Attempt
from gpu_worker.gpu import Device
from gpu_worker.health import watch
from gpu_worker.lease import Lease
from gpu_worker.patience import Patience
from gpu_worker.pool import IDLE_S, TrainerPool
from gpu_worker.report import make_report
from gpu_worker.storage_watch import StorageWatch
from gpu_worker.trainer_process import trainer_environment, worker_cache
from gpu_worker.wakeups import Wakeups
from jobqueue.broker import WAKE, make_app, queue_name, send_tokens
from jobqueue.embedded import connect_url
from jobqueue.errors import LoraqError, ServerError, StaleAttemptError
from jobqueue.job import Claim, FailureReason, JobKind, JobState, Settlement
from jobqueue.memory import classes_for
from jobqueue.retry import after_failure
from jobqueue.settings import Settings
from jobqueue.storage import Storage
from jobqueue.store import Store
from jobqueue.sweeper import Sweeper
from jobqueue.transfer import Mover

log = logging.getLogger(__name__)
LISTEN_AGAIN_S = 2.0  # after Celery has ended by itself
FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 600.0  # of a host that cannot write
SUPERVISOR = "LORAQ_SUPERVISOR"  # the process id of `gpu_worker.main`


class Worker:
    """Serves one device: claims what fits, one job per slot at a time, until it is told to drain."""

    def __init__(self, device: Device, settings: Settings, url: str, slots: int = 1) -> None:
        self.device, self.settings, self.slots = device, settings, slots
        self.id = f"{socket.gethostname()}/{device.label}"
        self.leaving = threading.Event()  # this process is to end
        self.drained = threading.Event()  # somebody wants this worker to take nothing; it stays
        self.store = Store(url, timeout_s=settings.timeout_s)
        self.app = make_app(url, settings.timeout_s)
        self.storage = Storage(settings.storage_url)
        cache = worker_cache(settings.data_dir, device)
        cache.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(cache / "scratch", ignore_errors=True)  # of attempts that ended with kill -9
        self.pool = TrainerPool(
            trainer_environment(device.kind, cache), cache, settings.grace_s, settings.trainer_command
        )
        self._slots = threading.BoundedSemaphore(slots)
        self._running: set[str] = set()
        self._unanswered: list[str] = []  # nonces of claims that may have been given
        self._pause_s = self._well_at = 0.0
        self._paused_for = ""
        self._wakeups = Wakeups(self.app)
        self._storage_watch = StorageWatch(self.storage, cache)
        self._watch = watch(device, cache, alive=lambda: bool(self._running) or not self.pool.empty)

    @property
    def classes(self) -> list[str]:
        """The memory classes whose wake-ups it listens to."""
        return classes_for(self._watch.health.usable_bytes) if self.device.kind == "gpu" else [self.device.kind]

    def _well(self) -> bool:
        return not (self._storage_watch.problem or self._watch.health.sick) and time.monotonic() >= self._well_at

    def _draining(self) -> bool:
        return self.leaving.is_set() or self.drained.is_set()

    def _note(self) -> str:
        """Why it takes no job, where that is so."""
        if self.drained.is_set():
            return "drained"
        if problem := self._storage_watch.problem:
            return f"sick: {problem}"
        if time.monotonic() < self._well_at:
            return f"it pauses: {self._paused_for}"
        return self._watch.health.note

    def work(self, *, wait: bool) -> None:
        """Claims until it is refused. With `wait`, a slot that is busy is waited for, else left alone."""
        if not self._slots.acquire(blocking=wait):
            return
        try:
            while not self._draining() and self._well() and self._work_once():
                pass
        finally:
            self._slots.release()

    def _work_once(self) -> bool:
        """One claim and its job; False where there was none, or the server is away."""
        health = self._watch.look()
        if health.sick:
            return False
        nonce = self._unanswered.pop() if self._unanswered else secrets.token_hex(8)
        claimed_at = guardian.now()
        try:
            claim = self.store.claim(
                self.id, self.device.kind, health.usable_bytes, self.settings.lease_s, nonce, self.classes
            )
        except ServerError as error:
            log.warning("no claim: %s", error.what)
            self._unanswered.append(nonce)  # a claim whose answer was lost is asked for again
            return False
        if claim is None:
            return False
        log.info("%s: attempt %d begins", claim.job_id, claim.attempt)
        self._running.add(claim.job_id)
        try:
            self._run(claim, claimed_at)
        except Exception:  # nothing that a job does may end its worker; the lease ends the job
            log.exception("%s: attempt %d broke its slot", claim.job_id, claim.attempt)
            self._pause("an attempt broke its slot")
        finally:
            self._running.discard(claim.job_id)
        return True

    def _run(self, claim: Claim, claimed_at: float) -> None:
        if claim.spec["kind"] == JobKind.REPORT:
            self._report(claim, claimed_at)
            return
        wake = partial(send_tokens, self.app)
        attempt = Attempt(
            claim,
            claimed_at,
            self.store,
            self.storage,
            self.settings,
            self.pool,
            self._watch,
            self.leaving,
            self._draining,
            wake,
        )
        attempt.run()
        self._pause(attempt.sick)

    def _pause(self, sick: str) -> None:
        """A host whose storage or disk fails would spoil the whole queue, one job after the other: it rests, longer
        each time, until an attempt shows that it is well again. (What is full for an adapter may hold a trial.)"""
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LAST_PAUSE_S) if sick else 0.0
        self._well_at, self._paused_for = time.monotonic() + self._pause_s, sick
        if sick:
            self._storage_watch.try_again()
            log.warning("nothing is claimed for %g s: %s", self._pause_s, sick)

    def _report(self, claim: Claim, claimed_at: float) -> None:
        lease = Lease(self.store, claim, self.settings, claimed_at)
        try:
            try:
                make = partial(make_report, claim, self.store, self.storage)
                made = lease.insist(partial(Patience(lease, self.settings, self.leaving), "make the report", make))
                end = Settlement(JobState.SUCCEEDED, outcome=made)
            except StaleAttemptError:
                raise
            except Exception as error:
                log.exception("%s: no report", claim.job_id)
                reason, message = FailureReason.INTERNAL, f"{type(error).__name__}: {error}"
                if isinstance(error, LoraqError):
                    reason, message = FailureReason.STORAGE, error.what
                end = after_failure(reason, message, claim.failures, self.settings.max_failures)
            lease.settle(end, self.leaving)
        except StaleAttemptError as error:
            log.warning("%s", error.what)
        finally:
            lease.close()

    # -- what goes on beside the jobs

    def ask(self) -> None:
        """A wake-up may be eaten by the wrong worker: an idle slot asks by itself."""
        while not self.leaving.wait(self.settings.poll_s):
            self.pool.expire(IDLE_S if self._well() else 0)  # a resting trainer keeps a sick card from being reset
            if len(self._running) < self.slots:
                threading.Thread(target=self.work, kwargs={"wait": False}, daemon=True).start()

    def beat(self) -> None:
        """Tells the store that it lives, what it is and what it does; leaves when it drains."""
        while True:
            info = {
                "host": socket.gethostname(),
                "device": self.device.name,
                "uuid": self.device.uuid,
                "usable_bytes": self._watch.health.usable_bytes,
                "slots": self.slots,
                "running": sorted(self._running),
                "note": self._note(),
                "every_s": self.settings.heartbeat_s,
            }
            try:
                if self.store.heartbeat(self.id, self.device.kind, info):
                    self.drained.set()
                    self.pool.close()  # a resting trainer holds GPU memory
                else:
                    self.drained.clear()
            except ServerError as error:
                log.warning("no heartbeat: %s", error.what)
            self._wakeups.listen_to(self.classes if self._well() and not self._draining() else [])
            if self.leaving.wait(self.settings.heartbeat_s):
                return

    def leave(self) -> None:
        self.pool.close()
        try:
            self.store.leave(self.id)
        except ServerError as error:
            log.warning("left without a word: %s", error.what)

    def serve(self) -> None:
        """Runs Celery in this thread until SIGTERM or SIGINT, then drains."""

        @self.app.task(name=WAKE, ignore_result=True)
        def wake() -> None:
            self.work(wait=True)

        @setup_logging.connect(weak=False)
        def leave_logging_alone(**_: object) -> None:
            pass

        @worker_shutting_down.connect(weak=False)
        def drain(**_: object) -> None:
            self.leaving.set()

        side: list[Callable[[], None]] = [self.beat, self.ask]
        if self.device.kind == "control":
            sweeper = Sweeper(self.store, self.app, self.settings)
            side.append(partial(sweeper.run, self.leaving))
            side.append(partial(Mover(self.store, self.storage, self.id).run, self.leaving))
        for task in side:
            threading.Thread(target=task, daemon=True).start()
        try:
            while not self.leaving.is_set():
                self._listen()
                if not self.leaving.is_set():
                    log.error("Celery has ended by itself; it is started again, jobs go on")
                    self.leaving.wait(LISTEN_AGAIN_S)
        finally:
            self.leaving.set()
            for _ in range(self.slots):  # Celery waits for jobs that a token began; `ask` begins others
                self._slots.acquire()
            self.leave()

    def _listen(self) -> None:
        """Runs Celery until it is told to end, or meets an error that it takes for its end: it cannot connect while
        Redis is at its memory limit."""
        options = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        listen = [
            "--quiet",
            "worker",
            "-P",
            "threads",
            "-c",
            str(self.slots),
            "-Q",
            ",".join(map(queue_name, self.classes or classes_for(sys.maxsize))),
        ]
        with contextlib.suppress(SystemExit):
            self.app.worker_main([*listen, "-n", f"{self.device.label}@%h", *options])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("gpu", "cpu", "control"), required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--uuid", default="")
    parser.add_argument("--index", type=int, default=0)
    chosen = parser.parse_args()
    guardian.die_with(int(os.environ[SUPERVISOR]))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {chosen.kind}{chosen.index} %(levelname)s %(message)s")
    logging.getLogger("celery").setLevel(logging.WARNING)
    # Celery warns of root for the sake of pickle, which this app does not accept; containers often run as root.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    device = Device(chosen.kind, chosen.name or chosen.kind, chosen.uuid, chosen.index)
    settings = Settings()
    Worker(device, settings, connect_url(settings)).serve()


if __name__ == "__main__":
    main()
