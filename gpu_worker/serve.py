"""One Celery process for one device, or for the host's control work. Started by `gpu_worker.main`, already pinned."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial

from celery.exceptions import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down
from celery.worker import state

from gpu_worker import guardian
from gpu_worker.gpu import Device
from gpu_worker.notifier import Notifier
from gpu_worker.wakeups import Wakeups
from gpu_worker.worker import Worker
from jobqueue.broker import WAKE, queue_name
from jobqueue.configuration import read_settings
from jobqueue.download import Provider
from jobqueue.embedded import connect_url
from jobqueue.errors import LoraqError, ServerError
from jobqueue.memory import classes_for
from jobqueue.sweeper import Sweeper
from jobqueue.transfer import Mover

log = logging.getLogger(__name__)
LISTEN_AGAIN_S = 2.0  # after Celery has ended by itself
SUPERVISOR = "LORAQ_SUPERVISOR"  # the process id of `gpu_worker.main`


class Server:
    """A worker that Celery wakes, and what goes on beside its jobs."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._app, self._settings = worker, worker.app, worker.settings
        self._wakeups = Wakeups(self._app)
        self._sweeper: Sweeper | None = None

    def _ask(self) -> None:
        """A wake-up may be eaten by the wrong worker: an idle slot asks by itself."""
        while not self._worker.leaving.wait(self._settings.poll_s):
            try:
                self._worker.tend()
                if self._worker.idle_slots > 0:
                    threading.Thread(target=self._worker.work, kwargs={"wait": False}, daemon=True).start()
            except Exception:  # a host without memory starts no process and no thread; the next round may
                log.exception("the trainers were not looked after, and no idle slot has asked")

    def _beat(self) -> None:
        """Tells the store that it lives, what it is and what it does; hears whether it is to drain."""
        worker = self._worker
        while True:
            try:
                if worker.store.heartbeat(worker.id, worker.device.kind, worker.info() | self._of_control()):
                    worker.drained.set()
                    worker.pool.close()  # a resting trainer holds GPU memory
                else:
                    worker.drained.clear()
            except ServerError as error:
                log.warning("no heartbeat: %s", error.what)
            except Exception:  # without the next one it would pass for dead, and hear of no drain
                log.exception("a heartbeat broke off")
            self._wakeups.listen_to(worker.classes if worker.well() and not worker.draining() else [])
            if worker.leaving.wait(self._settings.heartbeat_s):
                return

    def _of_control(self) -> dict[str, object]:
        """What a control worker adds to the fields of WorkerInfo."""
        if self._sweeper is None:
            return {}
        webhooks = [*self._settings.webhooks, *self._settings.webhook_hosts]
        return {"webhooks": webhooks, "sweep_s": self._sweeper.sweep_s, "swept_at": self._sweeper.swept_at}

    def _export(self) -> None:
        try:
            from gpu_worker.exporter import Exporter
        except ImportError:
            log.error("no metrics: prometheus_client is not installed; pip install 'loraq[control]'")
            return
        Exporter(self._worker.store, self._settings).run(self._worker.leaving)

    def run(self) -> None:
        """Runs Celery in this thread until SIGTERM or SIGINT, then drains."""
        worker = self._worker

        @self._app.task(name=WAKE, ignore_result=True)
        def wake() -> None:
            worker.work(wait=True)

        @setup_logging.connect(weak=False)
        def leave_logging_alone(**_: object) -> None:
            pass

        @worker_shutting_down.connect(weak=False)
        def drain(**_: object) -> None:
            worker.leaving.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._leave)
        beat = threading.Thread(target=self._beat, daemon=True)
        beat.start()
        side: list[Callable[[], None]] = [self._ask]
        if worker.device.kind == "control":
            self._sweeper = Sweeper(worker.store, self._app, self._settings, worker.storage)
            side.append(partial(self._sweeper.run, worker.leaving))
            movers = (kind(worker.store, worker.storage, worker.id) for kind in (Mover, Provider))
            side += [partial(mover.run, worker.leaving) for mover in movers]
            side.append(partial(Notifier(worker.store, worker.storage, self._settings).run, worker.leaving))
            if self._settings.metrics_port is not None:
                side.append(self._export)
        for task in side:
            threading.Thread(target=task, daemon=True).start()
        try:
            while not worker.leaving.is_set():
                self._listen()
                if not worker.leaving.is_set():
                    log.error("Celery has ended by itself; it is started again, jobs go on")
                    worker.leaving.wait(LISTEN_AGAIN_S)
        finally:
            worker.leaving.set()
            beat.join(2 * self._settings.timeout_s)  # a heartbeat after the goodbye would list this worker again
            worker.leave()  # Celery waits for jobs that a token began; `_ask` begins others

    def _leave(self, *_: object) -> None:
        """On a signal, until Celery listens to signals itself, which may be after the first heartbeat."""
        self._worker.leaving.set()
        state.should_stop = os.EX_OK  # type: ignore[assignment]  # it begins as None

    def _listen(self) -> None:
        """Runs Celery until it is told to end, or meets an error that it takes for its end: it cannot connect while
        Redis is at its memory limit."""
        worker = self._worker
        queues = ",".join(map(queue_name, worker.classes or classes_for(sys.maxsize)))
        options = ["--without-gossip", "--without-mingle", "-n", f"{worker.device.label}@%h"]
        options += ["--task-events"] if self._settings.celery_events else ["--without-heartbeat"]
        with contextlib.suppress(SystemExit):
            self._app.worker_main(
                ["--quiet", "worker", "-P", "threads", "-c", str(worker.slots), "-Q", queues, *options]
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("gpu", "cpu", "control"), required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--uuid", default="")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--spares", type=int, default=0)
    parser.add_argument("--share", default="timeslice")
    chosen = parser.parse_args()
    guardian.die_with(int(os.environ[SUPERVISOR]))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {chosen.kind}{chosen.index} %(levelname)s %(message)s")
    logging.getLogger("celery").setLevel(logging.WARNING)
    # Celery warns of root for the sake of pickle, which this app does not accept; containers often run as root.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    device = Device(chosen.kind, chosen.name or chosen.kind, chosen.uuid, chosen.index)
    try:
        settings = read_settings()
        worker = Worker(device, settings, connect_url(settings), chosen.slots, chosen.spares, chosen.share)
    except LoraqError as error:
        sys.exit(str(error))
    Server(worker).run()


if __name__ == "__main__":
    main()
