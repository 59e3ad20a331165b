"""Padded rows, rows end to end and packed rows: speed and memory, and by how much their losses differ.

    python benchmarks/packing.py MODEL_DIR ROWS OUT_DIR [--rows 64] [--steps 20] [--length 2048]

Each way in a trainer of its own, with the same seed. Every optimizer step has all of the `--rows` rows, so that steps
see the same in all ways, packing too, and their losses can be compared one by one. Writes OUT_DIR/packing.json after
each way; those that are in it are not done again. The trainers import Unsloth together and train one after the other.
Without a GPU it runs as well, to try it out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from jobqueue.job_spec import TrainSpec
from jobqueue.spec import RunSpec

YARDSTICK = "padded"
WARM_UP = 5  # steps that are not timed: kernels are compiled


def ways(rows: int) -> dict[str, dict[str, Any]]:
    """Options of each; "small" has an eighth of the rows in a micro-batch."""
    whole = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    small = {"per_device_train_batch_size": max(1, rows // 8), "gradient_accumulation_steps": 8}
    return {
        YARDSTICK: whole | {"padding_free": False},
        "padded_small": small | {"padding_free": False},
        "padding_free": whole | {"padding_free": True},
        "padding_free_small": small | {"padding_free": True},
        "packing": whole | {"packing": True},  # there are never more sequences than rows
    }


def spec_of(way: str, options: argparse.Namespace) -> TrainSpec:
    training = ways(options.rows)[way] | {
        "auto_find_batch_size": False, "max_steps": options.steps, "logging_steps": 1, "learning_rate": 2e-5,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "max_seq_length": options.length, "save_minutes": 600,
    }  # fmt: skip
    data = {"source": str(options.data.absolute()), "limit": options.rows}
    run = RunSpec.model_validate(
        {"name": "packing", "base_model": str(options.model.absolute()), "data": data, "training": training}
    )
    return TrainSpec.of(run)


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains in this process."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    from gpu_worker.protocol import Checkpoint, Progress, Request
    from gpu_worker.trainer.train import train

    if not sys.stdin.readline():  # its turn; else whoever gives it has ended
        sys.exit(1)
    speeds: list[float] = []

    def report(event: Progress | Checkpoint) -> None:
        if isinstance(event, Progress) and event.loss is not None and (event.step or 0) > WARM_UP:
            speeds.append(event.tokens_per_s or 0.0)

    spec = spec_of(way, options)
    with tempfile.TemporaryDirectory() as output:
        outcome = train(spec, Request("packing", spec.model_dump(mode="json"), output), report)
    return {
        "way": way,
        "tokens_per_s": round(median(speeds), 1) if speeds else None,
        "losses": [loss for _, loss, _ in outcome["losses"]],
        **{name: outcome[name] for name in ("training", "memory", "time", "versions")},
    }


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Speeds, each beside the padded one; the largest difference of a step's loss from the padded step's."""
    found: dict[str, Any] = {}
    padded = next((run for run in runs if run["way"] == YARDSTICK), None)
    for run in runs:
        found[f"tokens_per_s_{run['way']}"] = run["tokens_per_s"]
        found[f"peak_gib_{run['way']}"] = round(run["memory"]["peak_reserved_bytes"] / 2**30, 2)
    for run in runs:
        if padded and run is not padded:
            differences = [abs(a - b) for a, b in zip(run["losses"], padded["losses"], strict=True)]
            name = "packed" if run["way"] == "packing" else run["way"]
            found[f"max_loss_difference_{name}"] = float(f"{max(differences):.2g}")
            if run["tokens_per_s"] and padded["tokens_per_s"]:
                found[f"speedup_{run['way']}"] = round(run["tokens_per_s"] / padded["tokens_per_s"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, metavar="rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--ways", nargs="+", choices=ways(1), default=list(ways(1)))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "packing.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    started = {way: start(way, options.out) for way in options.ways if way not in [run["way"] for run in runs]}
    for way, process in started.items():
        said, _ = process.communicate("go\n")
        if process.returncode != 0:
            print(f"{way} failed, see {options.out / 'trainers.log'}", flush=True)
            continue
        runs.append(json.loads(said.splitlines()[-1]))
        write(runs, options, file)
        print(way, runs[-1]["tokens_per_s"], "tokens/s,", runs[-1]["training"], flush=True)
    print(json.dumps(figures(runs), indent=1))


def start(way: str, out: Path) -> subprocess.Popen[str]:
    """A process that does it once it is told to."""
    with (out / "trainers.log").open("a") as log:
        words = [sys.executable, *sys.argv, "--one", way]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def write(runs: list[dict[str, Any]], options: argparse.Namespace, file: Path) -> None:
    written = {
        "figures": figures(runs),
        "machine": {"gpu": runs[0]["memory"]["gpu"], "python": platform.python_version(), "cores": os.cpu_count()},
        "versions": runs[0]["versions"],
        "options": {"model": options.model.name, "rows": options.rows, "length": options.length},
        "runs": runs,
    }
    file.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
