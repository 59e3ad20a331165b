"""Half an hour of faults: the chaos driver of tests/chaos for long, and its figures.

    python benchmarks/soak.py [--minutes 30] [--seed 1] [--out benchmarks/results/soak.json]

Server, hosts, workers and guardians are loraq's own. Most trainers are the stub of tests/stub_trainer.py; a few are
loraq's, with Unsloth on the CPU and the model of `loraq demo`. No GPU is needed, but root: the storage is a mount, so
that it can be full. Exits with 1 where an invariant did not hold; the file then says which.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_worker
import jobqueue
from jobqueue.embedded import server_binary

ROOT = Path(__file__).parents[1]
PAUSE_S = (0.4, 2.4)  # between two faults
HOSTS = 5
REAL_EVERY = 8  # batches for each that has a real train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]
    from driver import Chaos

    folder = Path(tempfile.mkdtemp(prefix=f"loraq-soak-{options.seed}-"))
    logging.basicConfig(filename=folder / "driver.log", level=logging.INFO, format="%(asctime)s %(message)s")
    print(f"logs in {folder}; code in {jobqueue.__file__}, {gpu_worker.__file__}", flush=True)
    chaos, began = Chaos(folder, options.seed, HOSTS, REAL_EVERY), time.monotonic()
    try:
        verdict = chaos.run(options.minutes * 60, pause_s=PAUSE_S)
    finally:
        chaos.close()
    server = subprocess.run([server_binary(), "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    versions = {name: importlib.metadata.version(name) for name in ("celery", "kombu", "redis")}
    result = {
        "figures": verdict.figures,
        "problems": verdict.problems,
        "faults": dict(sorted(verdict.faults.items())),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
        "hosts": HOSTS,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "versions": {**versions, "server": server.strip()},
        "job_columns": ["id", "state", "reason", "attempts", "failures", "steps", "steps_done"],
        "jobs": verdict.jobs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**result, "jobs": None}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in result["jobs"])
    options.out.write_text(text.replace('"jobs": null', f'"jobs": [\n{rows}\n ]') + "\n")
    print(verdict.text())
    sys.exit(bool(verdict.problems))


if __name__ == "__main__":
    main()
