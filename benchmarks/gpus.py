"""One sweep on 1, 2, 4 and 8 GPUs of a host: how its makespan shrinks, and what binds where it does not.

    python benchmarks/gpus.py MODEL_DIR ROWS OUT_DIR [--gpus 1,2,4,8] [--jobs 64] [--steps 100]

For each number of GPUs the script starts a server and `loraq worker`, submits the sweep once the spare trainers stand
ready, waits, and writes OUT_DIR/gpus-N.json; a number whose file is there is not run again. OUT_DIR/gpus.json has the
figures of all. Besides the makespan: seconds in which a GPU had no job, how long a free slot waited for its next job,
processor load, and main memory per worker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from makespan import SWEEP, wait_for_spares
from session import Session

SAMPLE_S = 2.0
KEPT = ("id", "state", "worker", "attempt", "queued_at", "claimed_at", "ended_at")  # of a job


class Sampler(threading.Thread):
    """Looks at the host every two seconds: processor load, GPU load, main memory of everything under the workers."""

    def __init__(self, worker: int, gpus: int) -> None:
        super().__init__(daemon=True)
        self._worker, self._gpus, self._over = psutil.Process(worker), gpus, threading.Event()
        self.cpu_percent: list[float] = []
        self.memory_bytes: list[int] = []
        self.gpu_percent: list[list[int]] = []

    def run(self) -> None:
        psutil.cpu_percent()
        handles = _handles(self._gpus)
        while not self._over.wait(SAMPLE_S):
            self.cpu_percent.append(psutil.cpu_percent())
            self.memory_bytes.append(_memory(self._worker))
            self.gpu_percent.append([_load(handle) for handle in handles])

    def stop(self) -> None:
        self._over.set()
        self.join()


def _handles(gpus: int) -> list[Any]:
    if not gpus:
        return []
    import pynvml

    pynvml.nvmlInit()
    return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(gpus)]


def _load(handle: Any) -> int:
    import pynvml

    return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)


def _memory(worker: psutil.Process) -> int:
    """Bytes of it and of all below it, shared pages divided among those that share them."""
    total = 0
    for process in [worker, *worker.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def run(options: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """The sweep on so many GPUs (0: on the CPU)."""
    which = [word for index in range(gpus) for word in ("--gpu", str(index))] or ["--cpu"]
    slots = [] if options.slots is None else ["--slots", str(options.slots)]
    with Session(options.out / f"gpus-{gpus}", [*which, *slots, "--spares", str(options.spares)]) as session:
        session.rows(str(options.rows), "rows.jsonl")
        wait_for_spares(session, options.spares * max(gpus, 1))
        sampler = Sampler(session.worker.pid, gpus)
        sampler.start()
        began = time.time()
        values = {"model": options.model.absolute(), "steps": options.steps, "length": options.length}
        session.submit("gpus", SWEEP.format(name="gpus", seeds=list(range(options.jobs)), **values))
        session.wait("gpus")
        sampler.stop()
        jobs = session.trains("gpus")
        workers = {worker.id: worker.slots for worker in session.client.workers() if worker.trains}
    return {
        "makespan_s": round(max(job["ended_at"] for job in jobs) - began, 2),
        "workers": {name: occupation(jobs, name, slots, began) for name, slots in workers.items()},
        "cpu_percent": sampler.cpu_percent, "memory_bytes": sampler.memory_bytes, "gpu_percent": sampler.gpu_percent,
        "steps": options.steps, "cores": os.cpu_count(), "python": platform.python_version(),
        "versions": (jobs[0]["outcome"] or {}).get("versions"), "jobs": [brief(job) for job in jobs],
    }  # fmt: skip


def brief(job: dict[str, Any]) -> dict[str, Any]:
    """What of a job is raw data here; losses and specs of all would be megabytes."""
    outcome = job["outcome"] or {}
    return {name: job[name] for name in KEPT} | {name: outcome.get(name) for name in ("time", "memory")}


def occupation(jobs: list[dict[str, Any]], worker: str, slots: int, began: float) -> dict[str, Any]:
    """How a worker spent its time: jobs, seconds without any, and how long a slot had been free at each claim."""
    own = sorted((job for job in jobs if job["worker"] == worker), key=lambda job: job["claimed_at"])
    ends = sorted(job["ended_at"] for job in own)
    idle, busy_until = 0.0, began
    for job in own:
        idle += max(0.0, job["claimed_at"] - busy_until)
        busy_until = max(busy_until, job["ended_at"])
    idle += max(job["ended_at"] for job in jobs) - busy_until
    free_since = [began] * slots + ends
    waits = [round(job["claimed_at"] - free, 3) for job, free in zip(own, free_since, strict=False)]
    return {"jobs": len(own), "slots": slots, "idle_s": round(idle, 2), "claim_s": waits}


def figures(parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What the runs so far tell."""
    found: dict[str, Any] = {}
    for gpus, part in parts.items():
        waits = [wait for worker in part["workers"].values() for wait in worker["claim_s"]]
        states = [job["state"] for job in part["jobs"]]
        found |= {
            f"makespan_s_{gpus}": part["makespan_s"],
            f"succeeded_{gpus}": states.count("succeeded"),
            f"idle_share_{gpus}": round(
                statistics.mean(worker["idle_s"] for worker in part["workers"].values()) / part["makespan_s"], 4
            ),
            f"claim_s_median_{gpus}": statistics.median(waits),
            f"claim_s_most_{gpus}": max(waits),
            f"cpu_percent_{gpus}": round(statistics.mean(part["cpu_percent"]), 1),
            f"host_gib_per_worker_{gpus}": round(max(part["memory_bytes"]) / len(part["workers"]) / 2**30, 2),
        }
        if gpus > 1 and 1 in parts:
            found[f"makespan_ratio_{gpus}"] = round(part["makespan_s"] / parts[1]["makespan_s"], 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", default="1,2,4,8", help="how many, comma-separated; 0: the CPU")
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--slots", type=int, help="of each GPU; as many as the worker takes where it is left out")
    parser.add_argument("--spares", type=int, default=16, help="of each GPU: with fewer, imports are measured as well")
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts: dict[int, dict[str, Any]] = {}
    for gpus in map(int, options.gpus.split(",")):
        file = options.out / f"gpus-{gpus}.json"
        if not file.exists():
            file.write_text(json.dumps(run(options, gpus), indent=1))
        parts[gpus] = json.loads(file.read_text())
        result = {"figures": figures(parts), "runs": parts}
        (options.out / "gpus.json").write_text(json.dumps(result, indent=1))
        print(json.dumps(result["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()
