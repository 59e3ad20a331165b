"""Trainings of every kind through the queue: what they learn, and how their losses compare with stock TRL and PEFT.

    python benchmarks/training.py MODEL_DIR ROWS.jsonl.gz OUT_DIR [--steps 60]

MODEL_DIR is a small chat model, ROWS are multiple-choice rows of another kind than the demo's questions.

- `layouts`, `methods`, `templates`, `optimizers`: a short job for each.
- `stock`: the losses of `stock_job.py`, and of the same training by loraq, from the same adapter, rows and seed; and
  again, for how far this machine repeats itself.
- `learnable`: the demo's questions, before and after.
- `forgetting`: that adapter trained on ROWS, with and without replay of the demo's questions, and scored on these.
- `stopping`: few rows and many steps, which the validation loss ends.
- `as-stock-fp16`: as `stock`, by trainers that believe the card to have no bf16 (`fp16_trainer.py`).

Writes OUT_DIR/training.json after each batch, with the figures that are known by then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import layouts
from session import Session

from jobqueue.spec import Method, Optimizer

DEMO = Path(__file__).parents[1] / "cli" / "demo"
SHORT_JOBS = ("layouts", "methods", "templates", "optimizers")
TEMPLATES = ("chatml", "llama-3", "gemma", "mistral", "alpaca")
SHORT = """\
name: {name}
base_model: {model}
data: {{source: messages.jsonl, limit: 64}}
training: {{per_device_train_batch_size: 8, gradient_accumulation_steps: 1, max_steps: 10, logging_steps: 1}}
sweep:
  grid: {{{key}: {values}}}
"""
AS_STOCK = """\
name: {name}
base_model: {model}
data: {{source: rows.jsonl, limit: {limit}}}
from_adapter: {start}
training:
  {{per_device_train_batch_size: 8, gradient_accumulation_steps: 1, auto_find_batch_size: false, max_steps: {steps},
    logging_steps: 1}}
"""
LEARNABLE = """\
name: learnable
base_model: {model}
data: {{source: demo.jsonl}}
training:
  {{per_device_train_batch_size: 16, gradient_accumulation_steps: 1, max_steps: {long}, learning_rate: {rate},
    max_seq_length: 256}}
evaluation: {{source: test.jsonl, metrics: [likelihood]}}
"""
FORGETTING = """\
name: forgetting
base_model: {model}
from_adapter: learnable/1
data: {{source: rows.jsonl, replay: {{source: demo.jsonl}}}}
training: {{per_device_train_batch_size: 16, gradient_accumulation_steps: 1, max_steps: {long}, learning_rate: {rate}}}
evaluation: {{source: test.jsonl, metrics: [likelihood]}}
sweep:
  grid: {{data.replay.fraction: [0.0, 0.2]}}
"""
STOPPING = """\
name: stopping
base_model: {model}
data: {{source: rows.jsonl, limit: 96, validation_split: 0.25}}
training:
  {{per_device_train_batch_size: 8, gradient_accumulation_steps: 1, max_steps: 400, learning_rate: {rate},
    eval_steps: 5, early_stopping_patience: 3, logging_steps: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpu", default="0")
    options = parser.parse_args()
    study = Study(options)
    study.run()
    if not options.cpu:
        study.run_in_fp16()


class Study:
    """The batches, one after the other or side by side, and what they have told so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.parts: dict[str, Any] = {}
        self.values: dict[str, Any] = {
            "model": options.model.absolute(), "start": (options.out / "start").absolute(), "limit": options.limit,
            "steps": options.steps, "long": 2 * options.steps, "rate": options.learning_rate,
        }  # fmt: skip

    def run(self) -> None:
        with self._session() as session:
            rows = session.rows(self.options.rows, "rows.jsonl")
            demo = session.rows(str(DEMO / "train.jsonl"), "demo.jsonl")
            session.rows(str(DEMO / "test.jsonl"), "test.jsonl")
            files = layouts.write(map(json.loads, demo.read_text().splitlines()), session.folder)
            self._submit(session, "learnable", LEARNABLE)
            for name, key, values in (
                ("layouts", "data.source", files),
                ("methods", "method", get_args(Method)),
                ("templates", "chat_template", TEMPLATES),
                ("optimizers", "training.optim", get_args(Optimizer)),
            ):
                self._submit(session, name, SHORT, key=key, values=json.dumps(values))
            self._submit(session, "stopping", STOPPING)
            self.parts["stock"] = stock(self.options, rows, self.values["start"])
            self._submit(session, "as-stock", AS_STOCK)
            self._wait(session, "learnable")
            self._submit(session, "forgetting", FORGETTING)
            for name in (*SHORT_JOBS, "as-stock", "stopping"):
                self._wait(session, name)
            self._submit(session, "as-stock-again", AS_STOCK)
            for name in ("as-stock-again", "forgetting"):
                self._wait(session, name)

    def run_in_fp16(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("fp16_trainer.py").absolute())]
        with self._session(trainer_command=json.dumps(command)) as session:
            session.rows(self.options.rows, "rows.jsonl")
            self._submit(session, "as-stock-fp16", AS_STOCK)
            self._wait(session, "as-stock-fp16")

    def _session(self, **settings: object) -> Session:
        worker = ["--cpu"] if self.options.cpu else ["--gpu", self.options.gpu]
        return Session(self.options.out, worker, **settings)

    def _submit(self, session: Session, name: str, sweep: str, **more: object) -> None:
        session.submit(name, sweep.format(name=name, **self.values, **more))

    def _wait(self, session: Session, name: str) -> None:
        session.wait(name)
        self.parts[name] = session.jobs(name)
        write(self.parts, self.options.out / "training.json")


def stock(options: argparse.Namespace, rows: Path, start: Path) -> dict[str, Any]:
    """What `stock_job.py` found; it leaves the adapter that it began with in `start`."""
    out = options.out / "stock.json"
    script = Path(__file__).with_name("stock_job.py")
    limits = ["--steps", str(options.steps), "--limit", str(options.limit)]
    subprocess.run([sys.executable, script, options.model, rows, start, out, *limits], check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def trained(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outcomes of the trainings that succeeded, in order of their trials."""
    return [job["outcome"] for job in jobs if job["kind"] == "train" and job["state"] == "succeeded"]


def kept(jobs: list[dict[str, Any]], trial: int | None) -> float:
    """Accuracy of a trial's adapter, or of the base model."""
    for job in jobs:
        if job["kind"] == "evaluate" and (
            job["id"].startswith("base-") if trial is None else f".{trial}." in job["id"]
        ):
            return float(job["outcome"]["likelihood"]["accuracy"])
    raise KeyError(trial)


def furthest(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest difference of two losses of one step."""
    losses = [{int(entry[0]): entry[1] for entry in history} for history in (one, other)]
    return max(abs(losses[0][step] - losses[1][step]) for step in losses[0])


def figures(parts: dict[str, Any]) -> dict[str, Any]:
    """What the batches that have ended tell."""
    found: dict[str, Any] = {name: len(trained(parts[name])) for name in SHORT_JOBS if name in parts}
    if "learnable" in parts:
        found["learnable_base_accuracy"] = kept(parts["learnable"], None)
        found["learnable_tuned_accuracy"] = kept(parts["learnable"], 1)
    if "as-stock" in parts:
        stock, (ours,) = parts["stock"], trained(parts["as-stock"])
        found["max_loss_difference_vs_trl"] = furthest(stock["losses"], ours["losses"])
        found["mean_loss"] = ours["training"]["mean_loss"]
        found["seconds_vs_trl"] = round(ours["time"]["train_s"] / stock["train_s"], 3)
        if stock["peak_reserved_bytes"]:
            found["peak_memory_vs_trl"] = round(ours["memory"]["peak_reserved_bytes"] / stock["peak_reserved_bytes"], 3)
    if "as-stock-again" in parts:
        (ours,), (again,) = trained(parts["as-stock"]), trained(parts["as-stock-again"])
        found["max_loss_difference_repeated"] = furthest(ours["losses"], again["losses"])
    if "as-stock-fp16" in parts:
        (ours,) = trained(parts["as-stock-fp16"])
        found["max_loss_difference_fp16_vs_trl"] = furthest(parts["stock"]["losses"], ours["losses"])
    if "forgetting" in parts:
        found["no_replay_kept_accuracy"] = kept(parts["forgetting"], 1)
        found["replay_kept_accuracy"] = kept(parts["forgetting"], 2)
    if "stopping" in parts:
        (stopped,) = trained(parts["stopping"])
        found["stopped_at_step"] = stopped["training"]["steps"]
        found["kept_step"] = stopped["validation"]["kept_step"]
    return found


def write(parts: dict[str, Any], file: Path) -> None:
    some = next(outcome for name in ("learnable", "layouts") for outcome in trained(parts.get(name, [])))
    result = {
        "figures": figures(parts),
        "machine": {
            "gpu": some["memory"].get("gpu"), "python": platform.python_version(), "cores": os.cpu_count()
        },
        "versions": some["versions"],
        **parts,
    }  # fmt: skip
    file.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()
