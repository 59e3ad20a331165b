"""Trainings of every kind through the queue: what they learn, and how their losses compare with stock TRL and PEFT.

    python benchmarks/training.py MODEL_DIR ROWS.jsonl.gz OUT_DIR [--steps 60]

MODEL_DIR is a small chat model, ROWS are multiple-choice rows of another kind than the demo's questions.

- `layouts`, `methods`, `templates`, `optimizers`, `options`: a short job for each.
- `stock`: the losses of `stock_job.py`, and of the same training by loraq, from the same adapter, rows and seed; and
  again, for how far this machine repeats itself.
- `learnable`: the demo's questions, before and after.
- `forgetting`: that adapter trained on ROWS, with and without replay of the demo's questions, and held by EWC instead;
  scored on these questions.
- `stopping`: few rows and many steps, which the validation loss ends.
- `as-stock-fp16`: as `stock`, with `dtype: float16`.

Writes OUT_DIR/training.json after each batch, with the figures that are known by then; batches that are in it are not
run again. Jobs run side by side, so nothing of time is compared. On a host of several GPUs, --gpu says which.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import layouts
from session import Session

from jobqueue.spec import Method, Optimizer

DEMO = Path(__file__).parents[1] / "cli" / "demo"
TEMPLATES = ("chatml", "llama-3", "gemma", "mistral", "alpaca")
SHORT_JOBS: dict[str, dict[str, Any]] = {  # batch -> what its jobs differ in
    "layouts": {"grid": {"data.source": [f"{layout}.jsonl" for layout in layouts.LAYOUTS]}},
    "methods": {"grid": {"method": get_args(Method)}},
    "templates": {"grid": {"chat_template": TEMPLATES}},
    "optimizers": {"grid": {"training.optim": get_args(Optimizer)}},
    "options": {
        "list": [
            {"training.packing": True},
            {"training.padding_free": False},
            {"lora.use_rslora": True},
            {"lora.bias": "all"},
            {"lora.lora_dropout": 0.1},
            {"training.neftune_noise_alpha": 5},
            {"lora.target_modules": "all-linear"},
            {"lora.use_gradient_checkpointing": True},
            {"lora.use_gradient_checkpointing": "unsloth"},
            {"method": "lora", "lora.loftq_config.loftq_bits": 4},
            {"method": "lora", "export.formats": ["merged_16bit"]},
            {"method": "full", "export.formats": ["merged_16bit"]},
        ]
    },
}
AFTER = {"forgetting": "learnable", "as-stock": "stock", "as-stock-again": "as-stock", "as-stock-fp16": "stock"}
# An adapter that later batches begin with: where it is gone, all of them are run again.
BEGIN_WITH = {"learned": ("learnable", "forgetting"), "start": ("stock", "as-stock", "as-stock-again", "as-stock-fp16")}
SAY_S = 30.0  # how often it is said what is under way
SHORT = """\
name: {name}
base_model: {model}
data: {{source: messages.jsonl, limit: 64}}
training: {{per_device_train_batch_size: 8, gradient_accumulation_steps: 1, max_steps: 10, logging_steps: 1}}
sweep: {sweep}
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
from_adapter: {learned}
data: {{source: rows.jsonl, replay: {{source: demo.jsonl}}}}
training: {{per_device_train_batch_size: 16, gradient_accumulation_steps: 1, max_steps: {long}, learning_rate: {rate}}}
evaluation: {{source: test.jsonl, metrics: [likelihood]}}
sweep:
  list:
    - {{data.replay.fraction: 0.0}}
    - {{data.replay.fraction: 0.2}}
    - {{data.replay.fraction: 0.0, ewc.ewc_lambda: 1000, ewc.data.source: demo.jsonl}}
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
    parser.add_argument("--slots", type=int, default=16)
    options = parser.parse_args()
    Study(options).run()


class Study:
    """The batches, side by side as far as one does not need another, and what they have told so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.out / "training.json"
        self.parts: dict[str, Any] = json.loads(self.file.read_text())["parts"] if self.file.exists() else {}
        for folder, batches in BEGIN_WITH.items():
            if not (options.out / folder).exists() and not set(batches) <= set(self.parts):
                self.parts = {name: part for name, part in self.parts.items() if name not in batches}
        self.values: dict[str, Any] = {
            "model": options.model.absolute(), "limit": options.limit, "rate": options.learning_rate,
            "steps": options.steps, "long": 2 * options.steps,
            **{folder: (options.out / folder).absolute() for folder in BEGIN_WITH},
        }  # fmt: skip

    def run(self) -> None:
        with self._session() as session:
            demo = session.rows(str(DEMO / "train.jsonl"), "demo.jsonl")
            session.rows(str(DEMO / "test.jsonl"), "test.jsonl")
            session.rows(self.options.rows, "rows.jsonl")
            layouts.write(map(json.loads, demo.read_text().splitlines()), session.folder)
            sweeps = {"learnable": LEARNABLE, "stopping": STOPPING}
            sweeps |= dict.fromkeys(SHORT_JOBS, SHORT)
            sweeps |= {"as-stock": AS_STOCK, "as-stock-again": AS_STOCK, "forgetting": FORGETTING}
            if not self.options.cpu:  # which computes in 32 bits, whatever is asked for
                sweeps["as-stock-fp16"] = f"dtype: float16\n{AS_STOCK}"
            self._work_off(session, {name: sweep for name, sweep in sweeps.items() if name not in self.parts})

    def _work_off(self, session: Session, sweeps: dict[str, str]) -> None:
        """Submits each as soon as what it needs is there, and writes what each has told as soon as it has ended."""
        stock = self._start_stock(session.folder / "rows.jsonl") if "stock" not in self.parts else None
        running: list[str] = []
        said_at = 0.0
        while running or stock or any(self._may_begin(name) for name in sweeps):
            for name in filter(self._may_begin, list(sweeps)):
                session.submit(
                    name, sweeps.pop(name).format(name=name, sweep=json.dumps(SHORT_JOBS.get(name)), **self.values)
                )
                running.append(name)
            for name in filter(session.ended, list(running)):
                running.remove(name)
                self._keep(session, name)
            if stock and stock.poll() is not None:
                if stock.returncode == 0:
                    self.parts["stock"] = json.loads((self.options.out / "stock.json").read_text())
                stock = None
            if time.monotonic() - said_at > SAY_S:
                said_at = time.monotonic()
                states = {name: Counter(job.state.value for job in session.client.jobs(name)) for name in running}
                print(time.strftime("%X"), {name: dict(found) for name, found in states.items()}, flush=True)
            time.sleep(0.5)
        if sweeps:
            print(f"not run, as what they begin with failed: {', '.join(sweeps)}", flush=True)

    def _may_begin(self, name: str) -> bool:
        needed = self.parts.get(AFTER.get(name, ""), [])
        return name not in AFTER or bool(needed and (AFTER[name] == "stock" or trained(needed)))

    def _keep(self, session: Session, name: str) -> None:
        self.parts[name] = session.jobs(name)
        if name == "learnable":
            for outcome in trained(self.parts[name]):
                adapter = session.storage / outcome["folder"] / "adapter"
                shutil.copytree(adapter, self.values["learned"], dirs_exist_ok=True)
        write(self.parts, self.file)

    def _start_stock(self, rows: Path) -> subprocess.Popen[bytes]:
        """`stock_job.py`; it leaves the adapter that it began with in `start`."""
        words = [self.options.model, rows, self.values["start"], self.options.out / "stock.json"]
        limits = ["--steps", str(self.options.steps), "--limit", str(self.options.limit)]
        seen = {} if self.options.cpu else {"CUDA_VISIBLE_DEVICES": self.options.gpu}  # TRL wants no more than one
        script = Path(__file__).with_name("stock_job.py")
        return subprocess.Popen([sys.executable, script, *words, *limits], env={**os.environ, **seen})

    def _session(self) -> Session:
        # In turns: what the kernels of one job do wrong harms no other.
        on_gpu = ["--gpu", self.options.gpu, "--slots", str(self.options.slots), "--share", "timeslice"]
        return Session(self.options.out, ["--cpu"] if self.options.cpu else on_gpu)


def trained(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outcomes of the trainings that succeeded, in order of their trials."""
    return [job["outcome"] for job in jobs if job["kind"] == "train" and job["state"] == "succeeded"]


def kept(jobs: list[dict[str, Any]], trial: int | None) -> float | None:
    """Accuracy of a trial's adapter, or of the base model; None where it was not asked."""
    for job in jobs:
        wanted = job["id"].startswith("base-") if trial is None else f".{trial}." in job["id"]
        if wanted and job["kind"] == "evaluate" and job["state"] == "succeeded":
            return float(job["outcome"]["likelihood"]["accuracy"])
    return None


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
    if "forgetting" in parts:
        found["no_replay_kept_accuracy"] = kept(parts["forgetting"], 1)
        found["replay_kept_accuracy"] = kept(parts["forgetting"], 2)
        found["ewc_kept_accuracy"] = kept(parts["forgetting"], 3)
    for stopped in trained(parts.get("stopping", [])):
        found["stopped_at_step"] = stopped["training"]["steps"]
        found["kept_step"] = stopped["validation"]["kept_step"]
    for ours in trained(parts.get("as-stock", [])):
        stock = parts["stock"]
        found["max_loss_difference_vs_trl"] = furthest(stock["losses"], ours["losses"])
        found["mean_loss"] = ours["training"]["mean_loss"]
        if stock["peak_reserved_bytes"]:
            found["peak_memory_vs_trl"] = round(ours["memory"]["peak_reserved_bytes"] / stock["peak_reserved_bytes"], 3)
        for again in trained(parts.get("as-stock-again", [])):
            found["max_loss_difference_repeated"] = furthest(ours["losses"], again["losses"])
    for ours in trained(parts.get("as-stock-fp16", [])):
        found["max_loss_difference_fp16_vs_trl"] = furthest(parts["stock"]["losses"], ours["losses"])
    return found


def write(parts: dict[str, Any], file: Path) -> None:
    outcomes = [outcome for name, part in parts.items() if name != "stock" for outcome in trained(part)]
    some = outcomes[0] if outcomes else {"memory": {}, "versions": {}}
    result = {
        "figures": figures(parts),
        "machine": {
            "gpu": some["memory"].get("gpu"), "python": platform.python_version(), "cores": os.cpu_count()
        },
        "versions": some["versions"],
        "parts": parts,
    }  # fmt: skip
    file.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()
