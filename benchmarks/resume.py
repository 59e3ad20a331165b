"""Fine-tunes and evaluations that are killed, beside the same left alone; and whether the GPU's memory comes back.

    python benchmarks/resume.py MODEL_DIR TRAIN.jsonl.gz TEST.jsonl.gz OUT_DIR [--steps 100] [--gpu 0] [--parts ...]

- `training`: the job `broken` loses its trainer, later its worker, to kill -9.
- `evaluation`: the base model's loses its trainer and its worker in the same way.
- `undisturbed`: `whole` and `again` are the job of `training` twice, left alone: what differs between these two is how
  far the machine repeats itself.

Nothing else may use the GPU during the first two, or its memory would count. Each part has a file in OUT_DIR; what is
there is not done again. OUT_DIR/resume.json has the figures of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
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
UNDISTURBED = ("whole", "again")
ADAPTER = "adapter_model.safetensors"
EVALUATION = """\
name: asked
base_model: {model}
evaluation: {{source: test.jsonl, limit: {questions}, per_device_eval_batch_size: 64, max_new_tokens: 40}}
"""
PATIENCE_S = 300.0
BACK_S = 30.0  # for the memory to come back
NEAR = 16 * 2**20  # bytes by which a card's own level changes once it has been used


class Cards:
    """Memory in use on each GPU, by NVML; the level is that of the start. With `cpu` there is none to look at."""

    def __init__(self, *, cpu: bool) -> None:
        self._handles: list[Any] = []
        if not cpu:
            import pynvml

            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        self._before = [self._used(index) for index in range(len(self._handles))]

    def _used(self, index: int) -> int:
        import pynvml

        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handles[index]).used)

    def held(self, worker: str) -> int:
        """Bytes above the level, of the GPU that the worker (host/gpu0) serves."""
        label = worker.rpartition("/")[2]
        if not self._handles:
            return 0
        index = int(label.removeprefix("gpu"))
        return max(0, self._used(index) - self._before[index])


def trainers(worker: psutil.Process) -> Iterator[psutil.Process]:
    for process in worker.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie too
            command = process.cmdline()
            if "gpu_worker.trainer.child" in command and "guardian.py" not in " ".join(command):
                yield process


def process_of(session: Session, worker: str) -> psutil.Process:
    """The Celery process of that worker (host/gpu0, host/cpu)."""
    label = worker.rpartition("/")[2]
    for process in psutil.Process(session.worker.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):  # one that has just ended has no command
            command = process.cmdline()
            kind, index = (command[command.index(option) + 1] for option in ("--kind", "--index"))
            if label in (kind, kind + index):
                return process
    raise RuntimeError(f"there is no worker {worker}")


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
        if time.monotonic() > deadline or job.state.final or job.attempt > attempt:
            raise RuntimeError(
                f"attempt {attempt} of {job_id} never came to {phase} {step}: attempt {job.attempt} {job.state}, "
                f"{job.message} {job.progress} {job.outcome.get('last_lines')}"
            )
        time.sleep(0.1)
    worker = process_of(session, job.worker)
    victims = list(trainers(worker)) if victim == "trainer" else [worker]
    lowest = held = cards.held(job.worker)
    for process in victims:
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    while (lowest := min(lowest, cards.held(job.worker))) > NEAR and time.monotonic() < began + BACK_S:
        time.sleep(0.02)
    fault = {
        "job": job_id, "phase": phase, "step": progress["step"], "killed": victim, "processes": len(victims),
        "worker": job.worker.rpartition("/")[2], "held_bytes": held, "left_bytes": lowest,
        "back_after_s": round(time.monotonic() - began, 2),
    }  # fmt: skip
    print(fault, flush=True)
    return fault


def trained(session: Session, options: argparse.Namespace, *names: str) -> list[dict[str, Any]]:
    """The trainings of these names once they have ended; their adapters are kept in OUT_DIR."""
    for name in names:
        session.wait(name)
    jobs = [session.trains(name)[0] for name in names]
    for name, job in zip(names, jobs, strict=True):
        shutil.copy(session.storage / job["outcome"]["folder"] / "adapter" / ADAPTER, kept_adapter(options.out, name))
    return jobs


def kept_adapter(out: Path, name: str) -> Path:
    return out / f"{name}.safetensors"


def submit(session: Session, options: argparse.Namespace, *names: str) -> None:
    session.rows(options.train, "train.jsonl")
    values = {"model": options.model.absolute(), "steps": options.steps, "save_steps": options.steps // 5}
    for name in names:
        session.submit(name, SWEEP.format(name=name, **values))


def differences(one: dict[str, Any], other: dict[str, Any], out: Path) -> dict[str, float]:
    """Between two train jobs: losses by step, and the adapters' weights (norm of the difference over the norm)."""
    losses = [{step: loss for step, loss, _ in job["outcome"]["losses"]} for job in (one, other)]
    assert losses[0].keys() == losses[1].keys(), "steps are missing"
    weights = [load_file(kept_adapter(out, job["batch"])) for job in (one, other)]
    flat = [torch.cat([w[name].flatten().double() for name in sorted(w)]) for w in weights]
    return {
        "max_loss_difference": max(abs(losses[0][step] - losses[1][step]) for step in losses[0]),
        "final_loss_difference": abs(
            one["outcome"]["training"]["final_loss"] - other["outcome"]["training"]["final_loss"]
        ),
        "adapter_relative_difference": float((flat[0] - flat[1]).norm() / flat[0].norm()),
    }


def training(session: Session, cards: Cards, options: argparse.Namespace) -> dict[str, Any]:
    submit(session, options, "broken")
    save_steps = options.steps // 5
    faults = [
        kill(session, cards, "broken.1", 1, "train", round(1.5 * save_steps), "trainer"),
        kill(session, cards, "broken.1", 2, "train", round(3.5 * save_steps), "worker"),
    ]
    return {"figures": {}, "faults": faults, "jobs": trained(session, options, "broken")}


def undisturbed(session: Session, cards: Cards, options: argparse.Namespace) -> dict[str, Any]:
    (broken,) = json.loads((options.out / "training.json").read_text())["jobs"]
    submit(session, options, *UNDISTURBED)
    whole, again = trained(session, options, *UNDISTURBED)
    alone = {f"{name}_undisturbed": value for name, value in differences(again, whole, options.out).items()}
    return {"figures": differences(again, broken, options.out) | alone, "faults": [], "jobs": [whole, again]}


def evaluation(session: Session, cards: Cards, options: argparse.Namespace) -> dict[str, Any]:
    session.rows(options.test, "test.jsonl")
    session.submit("asked", EVALUATION.format(model=options.model.absolute(), questions=options.questions))
    job_id = next(job["id"] for job in session.jobs("asked") if job["kind"] == "evaluate")
    faults = [
        kill(session, cards, job_id, attempt, "evaluate", 1, victim)
        for attempt, victim in enumerate(("trainer", "worker"), start=1)
    ]
    session.wait("asked")
    jobs = [job for job in session.jobs("asked") if job["id"] == job_id]
    return {"figures": {}, "faults": faults, "jobs": jobs}


PARTS: dict[str, Callable[[Session, Cards, argparse.Namespace], dict[str, Any]]] = {
    "training": training, "evaluation": evaluation, "undisturbed": undisturbed,
}  # fmt: skip


def main() -> None:
    parser = arguments()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--cpu", action="store_true", help="to try it out: memory is not looked at")
    options = parser.parse_args()
    device = ["--cpu"] if options.cpu else ["--gpu", options.gpu]
    cards, broke = Cards(cpu=options.cpu), []
    # One slot: a worker that is killed takes no other job with it. No spares: their memory would stay.
    with Session(options.out, [*device, "--slots", "1", "--spares", "0"], lease_s=15, renew_s=2) as session:
        for name in options.parts:
            file = options.out / f"{name}.json"
            try:
                if not file.exists():
                    file.write_text(json.dumps(PARTS[name](session, cards, options), indent=1))
            except Exception:  # the other parts may do
                traceback.print_exc()
                broke.append(name)
            write(options.out)
    if broke:
        sys.exit(f"broke off: {', '.join(broke)}")


def write(out: Path) -> None:
    files = [out / f"{name}.json" for name in PARTS]
    parts = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    if not parts:
        return
    faults = [fault for part in parts.values() for fault in part["faults"]]
    jobs = [job for part in parts.values() for job in part["jobs"]]
    outcome = jobs[0]["outcome"]
    result = {
        "figures": {
            **{name: value for part in parts.values() for name, value in part["figures"].items()},
            "kills": len(faults),
            "memory_left_bytes": max(fault["left_bytes"] for fault in faults),
            "memory_back_s": max(fault["back_after_s"] for fault in faults),
            "jobs_succeeded": sum(job["state"] == "succeeded" for job in jobs),
            "jobs": len(jobs),
        },
        "machine": {"gpu": outcome["memory"]["gpu"], "python": platform.python_version(), "cores": os.cpu_count()},
        "versions": outcome["versions"],
        **parts,
    }
    (out / "resume.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()
