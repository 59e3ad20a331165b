"""Jobs side by side on one GPU, in turns and by MPS; and what a fault of one does to the others.

    python benchmarks/share.py run MODEL_DIR ROWS OUT_DIR --share timeslice|mps [--jobs 16] [--steps 100]
    python benchmarks/share.py fault MODEL_DIR ROWS OUT_DIR --share timeslice|mps [--jobs 4] [--steps 200]
    python benchmarks/share.py memory MODEL_DIR ROWS OUT_DIR --share timeslice|mps [--jobs 4] [--steps 200]
    python benchmarks/share.py figures OUT_DIR

`fault`: once all jobs train, the one with seed 0 indexes a tensor out of its bounds on the GPU, and does so again in
each of its attempts: a device-side assertion, for which MPS may end all clients. It must fail, the others must succeed
and pay nothing. `memory`: there, it takes all the memory that it may have, and runs out of it in its first attempt; all
must succeed, the others in theirs. Each subcommand writes its own part into OUT_DIR, unless it is there already;
`figures` makes share.json of the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from session import Session

SWEEP = """\
name: share
base_model: {model}
data: {{source: rows.jsonl}}
training:
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
  max_steps: {steps}
  save_steps: {save_steps}
  logging_steps: 1
sweep:
  grid: {{training.seed: {seeds}}}
"""
FAULT = "SHARE_FAULT"  # names the file whose appearance is the sign to do it
PATIENCE_S = 300.0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A batch of fine-tunes that differ in their seeds; the first of them does what the command says."""
    began, settings = time.perf_counter(), dict[str, object]()
    sign = options.out.absolute() / "fault.sign"
    sign.unlink(missing_ok=True)
    if options.command in HARM:
        os.environ[FAULT] = str(sign)
        command = [sys.executable, str(Path(__file__).absolute()), "trainer", options.command]
        settings["trainer_command"] = json.dumps(command)
    worker = ["--gpu", options.gpu, "--slots", str(options.jobs), "--spares", "0", "--share", options.share]
    with Session(options.out / f"{options.command}-{options.share}", worker, **settings) as session:
        session.rows(str(options.rows), "rows.jsonl")
        values = {"model": options.model.absolute(), "steps": options.steps, "save_steps": options.steps // 4}
        session.submit("share", SWEEP.format(seeds=list(range(options.jobs)), **values))
        if options.command in HARM:
            wait_until_all_train(session)
            sign.touch()
        session.wait("share")
        makespan_s = time.perf_counter() - began
        trains = session.trains("share")
        shares = [worker.share for worker in session.client.workers() if worker.trains]
    return {
        "makespan_s": round(makespan_s, 2), "steps": options.steps, "workers": shares, "jobs": trains,
        "cores": os.cpu_count(), "python": platform.python_version(),
    }  # fmt: skip


def wait_until_all_train(session: Session) -> None:
    """Until every job has done a few steps and none is near its end: a fault then hits all of them."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        jobs = [job for job in session.client.jobs("share") if job.kind == "train"]
        if all(job.progress.get("phase") == "train" and job.progress.get("step", 0) >= 5 for job in jobs):
            return
        if time.monotonic() > deadline or any(job.state.final for job in jobs):
            raise SystemExit(f"they never trained together: {[(job.id, job.state, job.progress) for job in jobs]}")
        time.sleep(0.5)


def trainer(harm: str) -> None:
    """loraq's own trainer, but that the job with seed 0 does harm when the sign is there."""
    from gpu_worker.trainer import child

    works = child._run

    def work(request: Any, emit: Any) -> Any:
        if request.spec["training"]["seed"] == 0:
            threading.Thread(target=do_harm, args=(harm, request.rung), daemon=True).start()
        return works(request, emit)

    child._run = work
    child.main()


def do_harm(harm: str, rung: int) -> None:
    sign = Path(os.environ[FAULT])
    while not sign.exists():
        time.sleep(0.1)
    HARM[harm](rung)


def assert_on_device(rung: int) -> None:
    import torch

    there = torch.zeros(4, device="cuda")
    there[torch.tensor([1_000_000], device="cuda")].sum().item()


def take_all_memory(rung: int) -> None:
    import torch

    held, size = [], 2**30
    while rung == 0 and size > 2**16:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    time.sleep(60)  # until the training has met it


HARM: dict[str, Callable[[int], None]] = {"fault": assert_on_device, "memory": take_all_memory}


def figures(out: Path) -> dict[str, Any]:
    """Everything that the parts tell so far."""
    parts = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json")) if file.stem != "share"}
    found: dict[str, Any] = {}
    for share in ("timeslice", "mps"):
        if (part := parts.get(f"run-{share}")) and all(job["state"] == "succeeded" for job in part["jobs"]):
            outcomes = [job["outcome"] for job in part["jobs"]]
            step_ms = 1000 * sum(o["time"]["train_s"] for o in outcomes) / len(outcomes) / part["steps"]
            found[f"step_ms_{share}"] = round(step_ms, 1)
            found[f"job_step_ms_{share}"] = round(step_ms / len(outcomes), 1)
            found[f"makespan_s_{share}"] = part["makespan_s"]
        for harm in HARM:
            if part := parts.get(f"{harm}-{share}"):
                culprit, *others = part["jobs"]
                found |= {
                    f"{harm}_culprit_{share}": f"{culprit['state']} ({culprit['reason']})",
                    f"{harm}_culprit_attempts_{share}": culprit["attempt"],
                    f"{harm}_others_succeeded_{share}": sum(job["state"] == "succeeded" for job in others),
                    f"{harm}_others_{share}": len(others),
                    f"{harm}_others_failures_{share}": sum(job["failures"] for job in others),
                    f"{harm}_others_interrupted_{share}": sum(job["attempt"] > 1 for job in others),
                }
    if {"step_ms_timeslice", "step_ms_mps"} <= found.keys():
        turns, mps = parts["run-timeslice"], parts["run-mps"]
        found["mps_speedup"] = round(found["step_ms_timeslice"] / found["step_ms_mps"], 2)
        found["max_loss_difference"] = max(
            abs(one[1] - other[1])
            for ours, theirs in zip(turns["jobs"], mps["jobs"], strict=True)
            for one, other in zip(ours["outcome"]["losses"], theirs["outcome"]["losses"], strict=True)
        )
    (out / "share.json").write_text(json.dumps({"figures": found, **parts}, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", *HARM):
        command = commands.add_parser(name)
        command.add_argument("model", type=Path)
        command.add_argument("rows", type=Path)
        command.add_argument("out", type=Path)
        command.add_argument("--share", choices=("timeslice", "mps"), required=True)
        command.add_argument("--jobs", type=int, default=16 if name == "run" else 4)
        command.add_argument("--steps", type=int, default=100 if name == "run" else 200)
        command.add_argument("--gpu", default="0")
    commands.add_parser("figures").add_argument("out", type=Path)
    commands.add_parser("trainer").add_argument("harm", choices=HARM)
    options = parser.parse_args()
    if options.command == "trainer":
        trainer(options.harm)
        return
    if options.command == "figures":
        print(json.dumps(figures(options.out), indent=1))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.command}-{options.share}.json"
    if file.exists():
        print(f"{file} is there already")
        return
    part = run(options)
    file.write_text(json.dumps(part, indent=1))
    print({key: value for key, value in part.items() if key != "jobs"})


if __name__ == "__main__":
    main()
