"""How soon a batch of fine-tunes is done, beside the notebook's way: one process after the other.

    python benchmarks/makespan.py limit OUT_DIR                                     # the GPU's bf16 matrix rate
    python benchmarks/makespan.py yardstick MODEL_DIR ROWS OUT_DIR --name 1b --steps 200 [--jobs 2]
    python benchmarks/makespan.py stock MODEL_DIR ROWS OUT_DIR                      # one job by TRL, PEFT, bitsandbytes
    python benchmarks/makespan.py product MODEL_DIR ROWS OUT_DIR --name 16x1b --jobs 16 --steps 200 [--warm]
    python benchmarks/makespan.py curve MODEL_DIR ROWS OUT_DIR                      # 16, 8, 4, 2, 1 jobs at once
    python benchmarks/makespan.py figures OUT_DIR

Each subcommand writes its own part into OUT_DIR, so that what breaks off can be gone on with; a part that is there is
not done again. `figures` makes makespan.json of the parts, and of what packing.py has left in the same folder. A batch
is done when the last adapter is stored. `--warm`: the clock starts when the spare trainers stand ready, else before
server and worker are started. On a host of several GPUs, --gpu says which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
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
IMPORT_S = 5.0  # of processor time, at least: a trainer that has had less may wait for another's import
YARDSTICKS = {"16x1b": "1b", "8x8b": "8b", "1x1b": "1b"}
AT_ONCE = (16, 8, 4, 2, 1)  # in this order: a trainer that is not needed any more may end
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
        job, out = [options.out / f"yardstick-{options.name}-{number}{end}" for end in (".json", ".seconds")]
        if not out.exists():
            script = Path(__file__).with_name("article_job.py")
            command = [sys.executable, script, options.model, options.rows.absolute(), job.absolute()]
            began = time.perf_counter()
            seed = ["--steps", str(options.steps), "--seed", str(number)]
            subprocess.run([*command, *seed], check=True, env=pinned(options))
            out.write_text(str(time.perf_counter() - began))
        found.append({"makespan_s": float(out.read_text())} | json.loads(job.read_text()))
    return {"jobs": found, "steps": options.steps}


def stock(options: argparse.Namespace) -> dict[str, Any]:
    """The losses of one job with the stock libraries, in micro-batches of 8 rows; its speed and memory."""
    out = options.out / "stock-job"
    out.mkdir(exist_ok=True)
    script = Path(__file__).with_name("stock_job.py")
    command = [sys.executable, script, options.model, options.rows.absolute(), out / "start", out / "stock.json"]
    subprocess.run([*command, "--steps", str(options.steps)], check=True, env=pinned(options))
    found: dict[str, Any] = json.loads((out / "stock.json").read_text())
    return found | {"steps": options.steps}


def pinned(options: argparse.Namespace) -> dict[str, str]:
    """The environment of a process that is to see the one GPU."""
    return dict(os.environ) if options.cpu else {**os.environ, "CUDA_VISIBLE_DEVICES": options.gpu}


def product(options: argparse.Namespace) -> dict[str, Any]:
    """The same jobs as a batch, on one GPU."""
    began = time.time()
    with started(options, options.slots or options.jobs, options.spares, options.name) as session:
        if options.warm:
            wait_for_spares(session, options.spares)
            began = time.time()
        jobs = work_off(session, options, options.name, options.jobs, options.steps)
        events = {job["id"]: session.client.events(job["id"]) for job in jobs}
        share = [worker.share for worker in session.client.workers() if worker.trains]
    firsts = []
    for job in jobs:
        steps = [event.at for event in events[job["id"]] if event.data.get("step")]
        firsts.append(round(steps[0] - job["claimed_at"], 2) if steps else None)
    return {
        "makespan_s": round(max(job["ended_at"] for job in jobs) - began, 2), "warm": options.warm,
        "steps": options.steps, "first_step_s": firsts, "share": share,
        "cores": os.cpu_count(), "python": platform.python_version(), "jobs": jobs,
    }  # fmt: skip


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """Batches of fewer and fewer jobs at once, each begun when all trainers stand ready."""
    most = max(AT_ONCE)
    found, ready_s = {}, []
    with started(options, most, most, "curve") as session:
        for n in AT_ONCE:
            began = time.monotonic()
            wait_for_spares(session, most)
            ready_s.append(round(time.monotonic() - began, 1))
            found[n] = work_off(session, options, f"at-once-{n}", n, options.steps)
    return {
        "steps": options.steps,
        "at_once": {
            n: round(job_step_ms(batch, options.steps), 1) for n, batch in found.items() if side_by_side(batch)
        },
        "ready_s": ready_s,
        "cores": len(os.sched_getaffinity(0)),
        "jobs": [job for batch in found.values() for job in batch],
    }


def started(options: argparse.Namespace, slots: int, spares: int, name: str) -> Session:
    device = ["--cpu"] if options.cpu else ["--gpu", options.gpu, "--share", options.share]
    return Session(options.out / f"product-{name}", [*device, "--slots", str(slots), "--spares", str(spares)])


def work_off(session: Session, options: argparse.Namespace, name: str, jobs: int, steps: int) -> list[dict[str, Any]]:
    """A batch of so many jobs that differ in their seeds; its trainings."""
    session.rows(str(options.rows), "rows.jsonl")
    values = {"model": options.model.absolute(), "steps": steps, "length": options.length}
    session.submit(name, SWEEP.format(name=name, seeds=list(range(jobs)), **values))
    session.wait(name)
    return session.trains(name)


def wait_for_spares(session: Session, spares: int) -> None:
    """Until so many trainers have imported everything: they use no processor time any more."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        before = trainers_time(session)
        time.sleep(2)
        after = trainers_time(session)
        quiet = [pid for pid, at in before.items() if pid in after and at > IMPORT_S and after[pid] - at < 0.05]
        if len(quiet) >= spares and len(quiet) == len(after):
            return
    raise SystemExit("the spares never stood ready")


def trainers_time(session: Session) -> dict[int, float]:
    """Process id of each trainer -> seconds of processor time that it has used."""
    found = {}
    for process in psutil.Process(session.worker.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if command[-1:] == ["gpu_worker.trainer.child"] and "guardian.py" not in str(command):
                found[process.pid] = process.cpu_times().user
    return found


def whole(jobs: list[dict[str, Any]]) -> bool:
    """Whether none has failed; those of the yardstick have no state."""
    return all(job.get("state", "succeeded") == "succeeded" for job in jobs)


def side_by_side(jobs: list[dict[str, Any]]) -> bool:
    """Whether all have succeeded, and all trained at once for most of the time that one of them took."""
    if not whole(jobs):
        return False
    trained = [job["outcome"]["time"]["train_s"] for job in jobs]
    last_began = max(job["ended_at"] - seconds for job, seconds in zip(jobs, trained, strict=True))
    return bool(min(job["ended_at"] for job in jobs) - last_began > 0.7 * sum(trained) / len(trained))


def job_step_ms(jobs: list[dict[str, Any]], steps: int) -> float:
    """Milliseconds of the GPU for each step of each job, where all of them ran side by side."""
    return 1000 * sum(job["outcome"]["time"]["train_s"] for job in jobs) / len(jobs) ** 2 / steps


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two trainings' losses of one step."""
    pairs = zip(one["outcome"]["losses"], other["outcome"]["losses"], strict=True)
    return float(max(abs(ours[1] - theirs[1]) for ours, theirs in pairs))


def figures(out: Path) -> dict[str, Any]:
    """Everything that the parts tell so far; nothing of a batch in which a job has failed."""
    files = [file for file in sorted(out.glob("*.json")) if file.stem != "makespan"]
    parts = {file.stem: json.loads(file.read_text()) for file in files if not file.stem.startswith("yardstick-")}
    batches = {name: part for name, part in parts.items() if name in YARDSTICKS and whole(part["jobs"])}
    found: dict[str, Any] = {}
    for name, batch in batches.items():
        if (single := parts.get(YARDSTICKS[name])) and single["steps"] == batch["steps"]:
            one = sum(job["makespan_s"] for job in single["jobs"]) / len(single["jobs"])
            found[f"speedup_{name}"] = round(one * len(batch["jobs"]) / batch["makespan_s"], 2)
        found[f"makespan_s_{name}"] = batch["makespan_s"]
    if (batch := batches.get("16x1b")) and (rate := parts.get("limit")):
        trains = [job["outcome"] for job in batch["jobs"]]
        tokens = sum(t["training"]["tokens"] for t in trains)
        slowest = max(t["time"]["train_s"] for t in trains)
        found["limit_ratio_16x1b"] = round(slowest / (6 * PARAMETERS["1b"] * tokens / (rate["tflops"] * 1e12)), 3)
        found["job_step_ms_16x1b"] = round(job_step_ms(batch["jobs"], batch["steps"]), 1)
    if batch := batches.get("1x1b"):
        found["first_step_with_spare_s"] = batch["first_step_s"][0]
        (alone,) = batch["jobs"]
        found["tokens_per_s_1x1b"] = alone["outcome"]["training"]["tokens_per_s"]
        found["peak_gib_1x1b"] = round(alone["outcome"]["memory"]["peak_reserved_bytes"] / 2**30, 2)
        if (many := batches.get("16x1b")) and many["steps"] == batch["steps"]:
            found["max_loss_difference_side_by_side"] = furthest(alone, many["jobs"][0])
    if stock := parts.get("stock"):
        found["tokens_per_s_stock"] = round(stock["tokens"] / stock["train_s"], 1)
        found["peak_gib_stock"] = round((stock["peak_reserved_bytes"] or 0) / 2**30, 2)
    if batch := batches.get("16x1b"):
        found["first_step_cold_s"] = max(filter(None, batch["first_step_s"]), default=None)
    if at_once := parts.get("curve", {}).get("at_once"):
        found |= {f"job_step_ms_{n}_at_once": ms for n, ms in at_once.items()}
    packed = parts.get("packing", {}).get("figures", {}).get("max_loss_difference_packed")
    if packed is not None:
        found["max_loss_difference_packed"] = packed
    (out / "makespan.json").write_text(json.dumps({"figures": found, **parts}, indent=1))
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "limit": limit, "yardstick": yardstick, "stock": stock, "product": product, "curve": curve,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*PARTS, "figures"):
        command = commands.add_parser(name)
        if name in ("yardstick", "stock", "product", "curve"):
            command.add_argument("model", type=Path)
            command.add_argument("rows", type=Path)
            command.add_argument("--steps", type=int, default={"stock": 60, "curve": 40}.get(name, 200))
            command.add_argument("--cpu", action="store_true")
            command.add_argument("--gpu", default="0")
        if name in ("yardstick", "product"):
            command.add_argument("--name", required=True)
            command.add_argument("--jobs", type=int, default=2)
        if name in ("product", "curve"):
            command.add_argument("--share", default="auto")
            command.add_argument("--length", type=int, default=2048)
        if name == "product":
            command.add_argument("--warm", action="store_true")
            command.add_argument("--slots", type=int)
            command.add_argument("--spares", type=int, default=1)
        command.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "figures":
        print(json.dumps(figures(options.out), indent=1))
        return
    file = options.out / f"{getattr(options, 'name', options.command)}.json"
    if file.exists() and whole(json.loads(file.read_text()).get("jobs", [])):
        print(f"{file} is there already")
        return
    part = PARTS[options.command](options)
    file.write_text(json.dumps(part, indent=1))
    print({key: value for key, value in part.items() if key not in ("jobs", "losses")})
    if not whole(part.get("jobs", [])):
        raise SystemExit(f"a job has failed; this part counts for nothing and is done again next time: {file}")


if __name__ == "__main__":
    main()
