"""`loraq worker`: finds this host's GPUs, starts one pinned Celery process for each and one for control, keeps them up.

    python -P -m gpu_worker.main [--cpu] [--gpu INDEX|UUID]... [--slots N] [--spares N]
        [--share auto|mps|timeslice|off] [--no-control] [--control-only]

SIGTERM drains all of them; when this process dies in any other way, they die with it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from gpu_worker.gpu import RAM_SHARE, Device, choose
from gpu_worker.marks import end_leftovers
from gpu_worker.trainer_process import worker_cache
from jobqueue.configuration import read_settings
from jobqueue.embedded import connect_url
from jobqueue.errors import LoraqError

log = logging.getLogger(__name__)
FIRST_DELAY_S, LAST_DELAY_S = 1.0, 60.0  # before a process that ended is started again
MOST_SLOTS = 16  # of one GPU: with more, small jobs gain nothing
CONTROL_SLOTS = 4  # a judge takes minutes, and reports are not to wait for it
SPARES = 1  # trainers that stand ready on a GPU
TRAINER_RAM = 5 * 2**30  # main memory of one trainer, its model on the way to the GPU included
SHARES = ("auto", "mps", "timeslice", "off")
CALM_S = 60.0  # one that lived so long starts with the first delay again


@dataclass
class Served:
    """One process for one device, started again when it ends."""

    device: Device
    command: list[str]
    environment: dict[str, str]
    cache: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    delay_s: float = field(default=FIRST_DELAY_S)

    def tend(self, now: float) -> None:
        """Starts it where it does not run and its time has come."""
        if self.process is not None and self.process.poll() is not None:
            log.warning("worker %s ended with %s", self.device.label, self.process.returncode)
            self.delay_s = FIRST_DELAY_S if now - self.started_at > CALM_S else min(self.delay_s * 2, LAST_DELAY_S)
            self.process, self.start_at = None, now + self.delay_s
            end_leftovers(self.cache)
        if self.process is None and now >= self.start_at:
            end_leftovers(self.cache)  # of a supervisor before this one
            # a session of its own: Ctrl-C in a terminal reaches this process only, which then drains the others once
            try:
                self.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
            except OSError as error:  # for want of memory, say: the other devices' workers go on
                self.delay_s = min(self.delay_s * 2, LAST_DELAY_S)
                self.start_at = now + self.delay_s
                log.warning("worker %s is not started for %g s: %s", self.device.label, self.delay_s, error)
                return
            self.started_at = now


def devices(options: argparse.Namespace) -> list[Device]:
    """What this host is to serve. Raises MachineError."""
    found = []
    if not options.control_only:
        found = [Device("cpu", "cpu")] if options.cpu else choose(options.gpu)
    if not options.no_control:
        found.append(Device("control", "control"))
    return found


def slots_for(device: Device, wanted: int | None, gpus: int, share: str) -> int:
    """How many jobs a device runs side by side at most; their memory decides, too, see gpu_worker/admission.py.

    Each needs a core that launches its kernels, and the main memory of a Python process with PyTorch in it.
    """
    if device.kind == "control":
        return CONTROL_SLOTS
    if share == "off":
        return 1
    if wanted is not None:
        return wanted
    if device.kind == "cpu":  # one training takes all cores
        return 1
    cores = (os.cpu_count() or 1) // gpus
    trainers = int(psutil.virtual_memory().total * RAM_SHARE / gpus / TRAINER_RAM)
    return max(1, min(MOST_SLOTS, cores, trainers))


def served(device: Device, url: str, data_dir: Path, slots: int, spares: int, share: str) -> Served:
    command = [sys.executable, "-P", "-m", "gpu_worker.serve", "--kind", device.kind, "--name", device.name]
    command += ["--uuid", device.uuid, "--index", str(device.index), "--slots", str(slots), "--spares", str(spares)]
    command += ["--share", share]
    # Pinned here, before the process exists: nothing in it can touch CUDA any earlier. By UUID, as indices change
    # with CUDA_DEVICE_ORDER; the control worker and a CPU worker see no GPU at all. The URL is no argument: it may
    # hold a password, and arguments are for everyone to read.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device.uuid, "LORAQ_REDIS_URL": url}
    environment["LORAQ_SUPERVISOR"] = str(os.getpid())
    return Served(device, command, environment, worker_cache(data_dir, device))


def run(options: argparse.Namespace) -> None:
    settings = read_settings()
    url = connect_url(settings)
    found = devices(options)
    gpus = sum(device.kind == "gpu" for device in found)
    workers = []
    for device in found:
        slots = slots_for(device, options.slots, gpus, options.share)
        spares = 0 if device.kind == "control" else options.spares
        if spares is None:
            spares = SPARES if device.kind == "gpu" else 0
        workers.append(served(device, url, settings.data_dir, slots, spares, options.share))
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopping.append(received))
    for worker in workers:
        log.info("serving %s: %s %s", worker.device.label, worker.device.name, worker.device.uuid)
    while not stopping:
        for worker in workers:
            worker.tend(time.monotonic())
        time.sleep(0.2)
    alive = [worker.process for worker in workers if worker.process is not None]
    for process in alive:
        process.terminate()
    for process in alive:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="loraq worker")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpu", action="append", default=[])
    parser.add_argument("--no-control", action="store_true")
    parser.add_argument("--control-only", action="store_true")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--spares", type=int)
    parser.add_argument("--share", choices=SHARES, default="auto")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    try:
        run(options)
    except LoraqError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
