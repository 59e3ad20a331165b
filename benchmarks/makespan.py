"""How soon a batch of fine-tunes is done, beside the notebook's way: one process after the other.

    python benchmarks/makespan.py limit OUT_DIR                                     # the GPU's bf16 matrix rate
    python benchmarks/makespan.py yardstick MODEL_DIR ROWS OUT_DIR --name 1b --steps 200 [--jobs 2]
    python benchmarks/makespan.py product MODEL_DIR ROWS OUT_DIR --name 16x1b --jobs 16 --steps 200 [--warm]
    python benchmarks/makespan.py figures OUT_DIR

Each subcommand writes its own part into OUT_DIR, so that what breaks off can be gone on with; `figures` makes
makespan.json of the parts. `--warm`: the clock starts when the spare trainers stand ready, else with the worker.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from session import Session

SWEEP = """\
name: {name}
base_model: {model}
data: {{source: rows.jsonl}}
training: {{max_steps: {steps}, logging_steps: 1, save_minutes: 600, max_seq_length: {length}}}
sweep:
  grid: {{training.seed: {seeds}}}
"""
READY_S = 120.0
YARDSTICKS = {"16x1b": "1b", "8x8b": "8b", "1x1b": "1b"}
MATRIX = 8192
PARAMETERS = {"1b": 1.236e9, "8b": 8.03e9}


def limit(options: argparse.Namespace) -> dict[str, Any]:
    """TFLOP/s of a bf16 product of 8192 cubed: the median of ten."""
    import torch

    a = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(13):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ a
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    median = sorted(seconds[3:])[5]
    return {"tflops": 2 * MATRIX**3 / median / 1e12, "gpu": torch.cuda.get_device_name()}


def yardstick(options: argparse.Namespace) -> dict[str, Any]:
    """Jobs one after the other, as the notebook does them."""
    found = []
    for number in range(options.jobs):
        out = options.out / f"yardstick-{options.name}-{number}.json"
        script = Path(__file__).with_name("article_job.py")
        command = [sys.executable, script, options.model, options.rows.absolute(), out.absolute()]
        began = time.perf_counter()
        subprocess.run([*command, "--steps", str(options.steps), "--seed", str(number)], check=True)
        found.append({"makespan_s": time.perf_counter() - began} | json.loads(out.read_text()))
    return {"jobs": found, "steps": options.steps}


def product(options: argparse.Namespace) -> dict[str, Any]:
    """The same jobs as a batch, on one GPU."""
    worker = ["--cpu"] if options.cpu else ["--gpu", options.gpu]
    worker += ["--slots", str(options.slots or options.jobs), "--spares", str(options.spares)]
    began = time.perf_counter()
    with Session(options.out / f"product-{options.name}", worker) as session:
        session.rows(str(options.rows), "rows.jsonl")
        if options.warm:
            wait_for_spares(session, options.spares)
            began = time.perf_counter()
        values = {"model": options.model.absolute(), "steps": options.steps, "length": options.length}
        session.submit(options.name, SWEEP.format(name=options.name, seeds=list(range(options.jobs)), **values))
        session.wait(options.name)
        makespan_s = time.perf_counter() - began
        jobs = session.jobs(options.name)
        events = {job["id"]: session.client.events(job["id"]) for job in jobs if job["kind"] == "train"}
    firsts = []
    for job in jobs:
        if job["kind"] == "train":
            steps = [event.at for event in events[job["id"]] if event.data.get("step")]
            firsts.append(round(steps[0] - job["claimed_at"], 2) if steps else None)
    return {
        "makespan_s": round(makespan_s, 2), "warm": options.warm, "steps": options.steps, "first_step_s": firsts,
        "cores": os.cpu_count(), "python": platform.python_version(), "jobs": jobs,
    }  # fmt: skip


def wait_for_spares(session: Session, spares: int) -> None:
    """Until so many trainers have imported everything: they use no processor time any more."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        children = psutil.Process(session.worker.pid).children(recursive=True)
        trainers = [
            p
            for p in children
            if p.cmdline()[-1:] == ["gpu_worker.trainer.child"] and "guardian.py" not in str(p.cmdline())
        ]
        before = [p.cpu_times().user for p in trainers]
        time.sleep(2)
        if (
            len(trainers) >= spares
            and [p.cpu_times().user - b < 0.05 for p, b in zip(trainers, before, strict=True)].count(True) >= spares
        ):
            return
    raise SystemExit("the spares never stood ready")


def figures(out: Path) -> dict[str, Any]:
    """Everything that the parts tell so far."""
    parts = {
        file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json")) if file.name != "makespan.json"
    }
    found: dict[str, Any] = {}
    for name, alone in YARDSTICKS.items():
        batch, single = parts.get(name), parts.get(alone)
        if batch and single:
            trains = [job for job in batch["jobs"] if job["kind"] == "train"]
            one = sum(job["makespan_s"] for job in single["jobs"]) / len(single["jobs"])
            found[f"speedup_{name}"] = round(
                one * len(trains) * batch["steps"] / single["steps"] / batch["makespan_s"], 2
            )
    if (batch := parts.get("16x1b")) and (rate := parts.get("limit")):
        trains = [job["outcome"] for job in batch["jobs"] if job["kind"] == "train" and job["outcome"]]
        tokens = sum(t["training"]["tokens"] for t in trains)
        slowest = max(t["time"]["train_s"] for t in trains)
        found["limit_ratio_16x1b"] = round(slowest / (6 * PARAMETERS["1b"] * tokens / (rate["tflops"] * 1e12)), 3)
    if batch := parts.get("1x1b"):
        found["first_step_with_spare_s"] = batch["first_step_s"][0]
    (out / "makespan.json").write_text(json.dumps({"figures": found, **parts}, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("limit", "yardstick", "product", "figures"):
        command = commands.add_parser(name)
        if name in ("yardstick", "product"):
            command.add_argument("model", type=Path)
            command.add_argument("rows", type=Path)
            command.add_argument("--name", required=True)
            command.add_argument("--steps", type=int, default=200)
            command.add_argument("--jobs", type=int, default=2)
        if name == "product":
            command.add_argument("--warm", action="store_true")
            command.add_argument("--cpu", action="store_true")
            command.add_argument("--gpu", default="0")
            command.add_argument("--slots", type=int)
            command.add_argument("--spares", type=int, default=1)
            command.add_argument("--length", type=int, default=2048)
        command.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "figures":
        print(json.dumps(figures(options.out), indent=1))
        return
    part = {"limit": limit, "yardstick": yardstick, "product": product}[options.command](options)
    file = options.out / f"{getattr(options, 'name', 'limit')}.json"
    file.write_text(json.dumps(part, indent=1))
    print({key: value for key, value in part.items() if key != "jobs"})


if __name__ == "__main__":
    main()
