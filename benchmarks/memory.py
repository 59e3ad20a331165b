"""How near the memory estimate is: jobs of many settings, their peaks measured, each in a trainer of its own.

    python benchmarks/memory.py TOKENIZER_DIR TEST.jsonl.gz OUT_DIR [--gpus 0,1] [--at-once 3]
    python benchmarks/memory.py --again results/memory.json    # today's estimates for what was measured; needs no GPU

Writes OUT_DIR/memory.json: of each setting the estimate, what PyTorch reserved at most, and what the driver saw.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from shapes import COMMON, SHAPES

from jobqueue.job_spec import EvaluateSpec, TrainSpec
from jobqueue.memory import estimate
from jobqueue.spec import RunSpec

ROWS = 64


def setting(size: str, method: str, length: int, batch: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "size": size, "method": method, "length": length, "batch": batch, **more}


def evaluation(size: str, in_4bit: bool, batch: int) -> dict[str, Any]:
    return {"kind": "evaluate", "size": size, "in_4bit": in_4bit, "batch": batch}


SETTINGS = [
    setting("1b", "qlora", 512, 1),
    setting("1b", "qlora", 512, 4),
    setting("1b", "qlora", 512, 16),
    setting("1b", "qlora", 2048, 1),
    setting("1b", "qlora", 2048, 4),
    setting("1b", "qlora", 2048, 16),
    setting("1b", "lora", 512, 8),
    setting("1b", "lora", 2048, 2),
    setting("1b", "lora", 2048, 8, checkpointing=False),
    setting("1b", "qlora", 512, 8, checkpointing=False),
    setting("1b", "qlora", 2048, 2, checkpointing=False),
    setting("1b", "qlora", 512, 8, checkpointing=True),
    setting("1b", "qlora", 512, 4, optim="adamw_torch", r=64),
    setting("1b", "full", 512, 2),
    setting("8b", "qlora", 512, 1),
    setting("8b", "qlora", 512, 8),
    setting("8b", "qlora", 2048, 1),
    setting("8b", "qlora", 2048, 4),
    setting("8b", "qlora", 512, 4, checkpointing=False),
    setting("8b", "lora", 512, 2),
    setting("8b", "lora", 2048, 2),
    evaluation("1b", True, 16),
    evaluation("1b", False, 64),
    evaluation("8b", True, 16),
    evaluation("8b", False, 16),
]


def spec_of(wanted: dict[str, Any], models: Path, test: Path, rows: Path) -> TrainSpec | EvaluateSpec:
    """The job that a sweep file of that setting would make."""
    run = RunSpec.model_validate(
        {"name": "memory", "base_model": str(models / wanted["size"]), "data": {"source": str(rows)}}
    )
    if wanted["kind"] == "train":
        checkpointing = wanted.get("checkpointing", "unsloth")
        lora = run.lora.model_copy(update={"use_gradient_checkpointing": checkpointing, "r": wanted.get("r", 16)})
        training = run.training.model_copy(
            update={
                "per_device_train_batch_size": wanted["batch"], "gradient_accumulation_steps": 1, "max_steps": 3,
                "max_seq_length": wanted["length"], "optim": wanted.get("optim", "adamw_8bit"), "logging_steps": 1,
            }
        )  # fmt: skip
        return TrainSpec(
            base_model=run.base_model, method=wanted["method"], data=run.data, lora=lora, training=training,
            resources=run.resources,
        )  # fmt: skip
    asked = {"source": str(test), "limit": 2 * wanted["batch"], "per_device_eval_batch_size": wanted["batch"]}
    return EvaluateSpec.model_validate(
        {
            "base_model": run.base_model, "method": "qlora", "adapter_job": None, "load_in_4bit": wanted["in_4bit"],
            "max_seq_length": 2048, "evaluation": asked, "resources": {},
        }
    )  # fmt: skip


def measure(spec: TrainSpec | EvaluateSpec) -> dict[str, Any]:
    """Runs the job in this process."""
    import pynvml

    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_DISABLE_CPU_FALLBACK": "1", "HF_HUB_OFFLINE": "1"}

    # isort: split
    import torch

    from gpu_worker.protocol import Request
    from gpu_worker.trainer.evaluate import evaluate
    from gpu_worker.trainer.train import train

    pynvml.nvmlInit()
    uuid = "GPU-" + str(torch.cuda.get_device_properties(0).uuid)
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            seen.extend(int(process.usedGpuMemory or 0) for process in running if process.pid == os.getpid())

    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory() as output:
        request = Request("memory", spec.model_dump(mode="json"), output)
        outcome = (
            train(spec, request, lambda _: None)
            if isinstance(spec, TrainSpec)
            else evaluate(spec, request, lambda _: None)
        )
    over.set()
    return {"memory": outcome["memory"], "driver_bytes": max(seen), "versions": outcome["versions"]}


def figures(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the estimates are under and over what was measured, as shares of it."""
    found: dict[str, Any] = {}
    for kind, prefix in (("train", ""), ("evaluate", "evaluation_")):
        shares = [s["estimated_bytes"] / s["driver_bytes"] - 1 for s in settings if s["kind"] == kind]
        found |= {
            f"{prefix}settings": len(shares),
            f"{prefix}worst_under": round(max(0.0, -min(shares, default=0.0)), 4),
            f"{prefix}worst_over": round(max(0.0, *shares, 0.0), 4),
        }
    return found


def estimated(wanted: dict[str, Any]) -> int:
    """Today's estimate of that setting."""
    spec = spec_of(wanted, Path("/models"), Path("/test"), Path("/rows"))
    return estimate({**COMMON, **SHAPES[wanted["size"]]}, spec)


def again(file: Path) -> None:
    known = json.loads(file.read_text())
    for setting in known["settings"]:
        if "failed" not in setting:
            setting["estimated_bytes"] = estimated(setting)
            setting["estimated_over_measured"] = round(setting["estimated_bytes"] / setting["driver_bytes"], 3)
    known["figures"] = figures([s for s in known["settings"] if "failed" not in s])
    file.write_text(json.dumps(known, indent=1))
    print(json.dumps(known["figures"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path, nargs="?")
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--gpus", default="0")
    parser.add_argument("--at-once", type=int, default=3, help="jobs on each GPU")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "loraq-shapes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--again", type=Path)
    options = parser.parse_args()
    if options.again:
        again(options.again)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = options.out / "rows.jsonl"
    if options.one:
        print(json.dumps(measure(spec_of(json.loads(options.one), options.models, options.test, rows))))
        return
    # A prompt of a few tokens and an answer that any length cuts: every row is as long as the length allows.
    row = {
        "messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two three " * 1500}]
    }
    rows.write_text(f"{json.dumps(row)}\n" * ROWS)
    for size in {s["size"] for s in SETTINGS}:
        shapes = [sys.executable, Path(__file__).with_name("shapes.py"), size, options.tokenizer, options.models / size]
        subprocess.run(shapes, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": options.gpus.split(",")[0]})
    gpus, place = options.gpus.split(","), count()

    def run(wanted: dict[str, Any]) -> dict[str, Any]:
        words = [sys.executable, __file__, options.tokenizer, options.test, options.out, "--one", json.dumps(wanted)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[next(place) % len(gpus)]}
        with (options.out / "trainers.log").open("a") as log:
            done = subprocess.run(
                [*words, "--models", options.models], stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
                check=False,
            )  # fmt: skip
        if done.returncode != 0:
            return {**wanted, "failed": done.returncode}
        result = {**wanted, "estimated_bytes": estimated(wanted), **json.loads(done.stdout.splitlines()[-1])}
        result["estimated_over_measured"] = round(result["estimated_bytes"] / result["driver_bytes"], 3)
        print({key: value for key, value in result.items() if key not in ("memory", "versions")}, flush=True)
        return result

    results = []
    with ThreadPoolExecutor(options.at_once * len(gpus)) as pool:
        for result in pool.map(run, SETTINGS):
            results.append(result)
            write(results, options.out / "memory.json")


def write(results: list[dict[str, Any]], file: Path) -> None:
    done = [result for result in results if "failed" not in result]
    if not done:
        return
    written = {
        "figures": figures(done),
        "machine": {"gpu": done[0]["memory"]["gpu"], "python": platform.python_version(), "cores": os.cpu_count()},
        "versions": done[0]["versions"],
        "settings": [{key: value for key, value in result.items() if key != "versions"} for result in results],
    }
    file.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
