"""Fine-tunes and evaluations that are killed, beside the same left alone; and whether the GPU's memory comes back.

    python benchmarks/resume.py MODEL_DIR TRAIN.jsonl.gz TEST.jsonl.gz OUT_DIR [--steps 100]

Training: the job `broken` loses its trainer, later its worker, to kill -9. `whole` and `again` are the same job twice,
undisturbed: what differs between these two is how far the machine repeats itself. Evaluation: the one of `whole` loses
its trainer and its worker in the same way. Uses all GPUs of the machine. Writes OUT_DIR/resume.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch
from safetensors.torch import load_file
from session import Session, arguments

SWEEP = """\
name: {name}
base_model: {model}
data: {{source: train.jsonl}}
lora: {{r: 16, lora_dropout: 0.05}}  # dropout: the state of the random numbers must come back too
training:
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
  max_steps: {steps}
  learning_rate: 2e-4
  save_steps: {save_steps}
  logging_steps: 1
"""
EVALUATION = "evaluation: {source: test.jsonl, limit: 400, compare_with_base: false}"
PATIENCE_S = 300.0
BACK_S = 30.0  # for the memory to come back


class Cards:
    """Memory in use on each GPU, by NVML; the level is that of the start."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        self.before = [self.used(index) for index in range(len(self._handles))]

    def used(self, index: int) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handles[index]).used)


def trainers(worker: psutil.Process) -> Iterator[psutil.Process]:
    for process in worker.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie too
            command = process.cmdline()
            if "gpu_worker.trainer.child" in command and "guardian.py" not in " ".join(command):
                yield process


def worker_of(session: Session, index: int) -> psutil.Process:
    """The Celery process of that GPU."""
    for process in psutil.Process(session.worker.pid).children():
        command = process.cmdline()
        if "gpu" in command and command[command.index("--index") + 1] == str(index):
            return process
    raise SystemExit(f"there is no worker for GPU {index}")


def kill(
    session: Session, cards: Cards, job_id: str, attempt: int, phase: str, step: int, victim: str
) -> dict[str, Any]:
    """kill -9 once that attempt is so far; how long until the card's memory is as it was at the start."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        job = session.client.job(job_id)
        progress = job.progress if job.state == "running" and job.attempt == attempt else {}
        if progress.get("phase") == phase and progress.get("step", 0) >= step:
            break
        if time.monotonic() > deadline or job.state.final:
            raise SystemExit(f"{job_id} never came to {phase} {step}: {job.state} {job.message} {job.progress}")
        time.sleep(0.1)
    index = int(job.worker.rpartition("gpu")[2])
    worker = worker_of(session, index)
    victims = list(trainers(worker)) if victim == "trainer" else [worker]
    before, held = cards.before[index], cards.used(index)
    for process in victims:
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    lowest = held
    while (lowest := min(lowest, cards.used(index))) > before and time.monotonic() < began + BACK_S:
        time.sleep(0.02)
    fault = {
        "job": job_id, "phase": phase, "step": progress["step"], "killed": victim, "processes": len(victims),
        "gpu": index, "held_bytes": held - before, "left_bytes": max(0, lowest - before),
        "back_after_s": round(time.monotonic() - began, 2),
    }  # fmt: skip
    print(fault, flush=True)
    return fault


def differences(one: dict[str, Any], other: dict[str, Any], storage: Path) -> dict[str, float]:
    """Between two train jobs: losses by step, and the adapters' weights (norm of the difference over the norm)."""
    losses = [{step: loss for step, loss, _ in job["outcome"]["losses"]} for job in (one, other)]
    assert losses[0].keys() == losses[1].keys(), "steps are missing"
    files = [storage / job["outcome"]["folder"] / "adapter" / "adapter_model.safetensors" for job in (one, other)]
    weights = [load_file(file) for file in files]
    flat = [torch.cat([w[name].flatten().double() for name in sorted(w)]) for w in weights]
    return {
        "max_loss_difference": max(abs(losses[0][step] - losses[1][step]) for step in losses[0]),
        "final_loss_difference": abs(
            one["outcome"]["training"]["final_loss"] - other["outcome"]["training"]["final_loss"]
        ),
        "adapter_relative_difference": float((flat[0] - flat[1]).norm() / flat[0].norm()),
    }


def main() -> None:
    parser = arguments()
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    cards, save_steps = Cards(), options.steps // 5
    with Session(options.out, ["--slots", "1", "--spares", "0"], lease_s=15, renew_s=2) as session:
        session.rows(options.train, "train.jsonl")
        session.rows(options.test, "test.jsonl")
        for name in ("broken", "whole", "again"):
            values = {"name": name, "model": options.model.absolute(), "steps": options.steps, "save_steps": save_steps}
            session.submit(name, SWEEP.format(**values) + (EVALUATION if name == "whole" else ""))

        def training() -> list[dict[str, Any]]:
            early, late = round(1.5 * save_steps), round(3.5 * save_steps)
            return [
                kill(session, cards, "broken.1", 1, "train", early, "trainer"),
                kill(session, cards, "broken.1", 2, "train", late, "worker"),
            ]

        def evaluation() -> list[dict[str, Any]]:
            return [
                kill(session, cards, "whole.1.eval", attempt, "evaluate", 1, victim)
                for attempt, victim in enumerate(("trainer", "worker"), start=1)
            ]

        with ThreadPoolExecutor() as pool:
            chains = [pool.submit(training), pool.submit(evaluation)]
        faults = [fault for chain in chains for fault in chain.result()]
        for name in ("broken", "again", "whole"):
            session.wait(name)
            if name != "broken":  # once the trainings have ended, and again when all has
                write(session, faults, options.out / "resume.json")


def write(session: Session, faults: list[dict[str, Any]], file: Path) -> None:
    jobs = {name: session.jobs(name) for name in ("broken", "whole", "again")}
    broken, whole, again = (jobs[name][0] for name in ("broken", "whole", "again"))
    killed, alone = differences(again, broken, session.storage), differences(again, whole, session.storage)
    memory = whole["outcome"]["memory"]
    result = {
        "figures": {
            **killed,
            **{f"{name}_undisturbed": value for name, value in alone.items()},
            "kills": len(faults),
            "memory_left_bytes": max(fault["left_bytes"] for fault in faults),
            "memory_back_s": max(fault["back_after_s"] for fault in faults),
            "jobs_succeeded": sum(job["state"] == "succeeded" for batch in jobs.values() for job in batch),
            "jobs": sum(map(len, jobs.values())),
        },
        "faults": faults,
        "machine": {"gpu": memory["gpu"], "python": platform.python_version(), "cores": os.cpu_count()},
        "versions": whole["outcome"]["versions"],
        "jobs": jobs,
    }
    file.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()
