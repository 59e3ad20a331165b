"""Likelihood accuracy in three ways on the same questions: the plain way, EleutherAI's lm-evaluation-harness, loraq's.

    python benchmarks/likelihood.py MODEL_DIR TEST.jsonl OUT_DIR [--limit N] [--repeats 3]

Writes OUT_DIR/likelihood.json after each repeat. Seconds are those that a way takes for scoring tokenised questions,
the best of the repeats: loading and tokenising are left out, loraq's first check against the plain way is not. The
whole time from the file to the picks is given beside it. All ways have batches of 64 rows, in bf16 (on a CPU, which is
for trying this out, loraq computes in 32 bits, and so do the others).

Needs beyond loraq[worker]: lm-eval 0.4.13 (without its dependencies) and sacrebleu.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from gpu_worker.protocol import Request
from gpu_worker.trainer import usage
from gpu_worker.trainer.evaluate import evaluate
from gpu_worker.trainer.model import free
from jobqueue.job_spec import EvaluateSpec
from jobqueue.spec import EvaluationSpec, ResourcesSpec

# isort: split
import plain_scores
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Picks = list[str]
Way = Callable[[Path, Path], tuple[Picks, float]]  # model folder, questions -> picks, seconds
TASK = "questions"


class Timed:
    """Seconds spent in a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *values: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._function(*values, **options)
        finally:
            self.seconds += time.perf_counter() - started


def load(model_dir: Path) -> tuple[Any, Any]:
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to("cuda" if on_gpu else "cpu").eval()
    return model, AutoTokenizer.from_pretrained(model_dir)


def pick(scores: dict[str, float]) -> str:
    return max(scores, key=scores.__getitem__)


def plainly(model_dir: Path, data: Path) -> tuple[Picks, float]:
    model, tokenizer = load(model_dir)
    scores, seconds = plain_scores.score(model, tokenizer, plain_scores.read(data))
    return [pick(found) for found in scores], seconds


def by_loraq(model_dir: Path, data: Path, ties: set[int]) -> tuple[Picks, float]:
    """What a trainer does with such a job; `ties`: filled with the questions of which it says so."""
    batch = plain_scores.BATCH
    asked = EvaluationSpec(source=str(data), metrics=("likelihood",), per_device_eval_batch_size=batch)
    spec = EvaluateSpec(
        base_model=str(model_dir), method="lora", adapter_job=None, load_in_4bit=False, max_seq_length=8192,
        evaluation=asked, resources=ResourcesSpec(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        outcome = evaluate(spec, Request("benchmark", {}, folder), lambda _: None)
        lines = [json.loads(line) for line in (Path(folder) / "questions.jsonl").read_text().splitlines()]
    if outcome["likelihood"]["plain_because"]:
        print(f"loraq scored plainly: {outcome['likelihood']['plain_because']}")
    ties.clear()
    ties |= {line["index"] for line in lines if "likelihood" in line["ties"]}
    return [line["picks"]["likelihood"] for line in lines], outcome["time"]["likelihood_s"]


def by_lm_eval(model_dir: Path, data: Path) -> tuple[Picks, float]:
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(model_dir)
    rows = plain_scores.read(data)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "docs.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for row in rows:
                choices = [plain_scores.reply_of(text) for text in row["options"].values()]
                gold = list(row["options"]).index(row["answer_idx"])
                doc = {"prompt": plain_scores.prompt_of(tokenizer, row), "choices": choices, "gold": gold}
                out.write(json.dumps(doc) + "\n")
        task = ConfigurableTask(
            cache_dir=folder,
            config={
                "task": TASK, "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
                "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            },
        )  # fmt: skip
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=plain_scores.BATCH)
        timed = Timed(harness._loglikelihood_tokens)
        harness._loglikelihood_tokens = timed
        found = simple_evaluate(harness, tasks=[task], bootstrap_iters=0)
    picks = [""] * len(rows)
    for sample in found["samples"][TASK]:
        scores = [likelihood for likelihood, _ in sample["filtered_resps"]]
        picks[sample["doc_id"]] = list(rows[sample["doc_id"]]["options"])[scores.index(max(scores))]
    return picks, timed.seconds


def measure(ways: dict[str, Way], model_dir: Path, data: Path, repeats: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Each way in turn, `repeats` times, after one round on a few questions that nobody counts; what is known after
    each round. A way that fails is left out from then on."""
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        few.write_text("".join(json.dumps(row) + "\n" for row in plain_scores.read(data)[:16]))
        working = {name: way for name, way in ways.items() if attempt(name, way, model_dir, few)}
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "whole_seconds": []} for name in working}
    for _ in range(repeats):
        for name, way in list(working.items()):
            free()
            started = time.perf_counter()
            if (scored := attempt(name, way, model_dir, data)) is None:
                del working[name]
                continue
            found[name]["picks"], seconds = scored
            found[name]["seconds"].append(round(seconds, 3))
            found[name]["whole_seconds"].append(round(time.perf_counter() - started, 3))
            print(f"{name}: {seconds:.2f} s", flush=True)
        yield {name: way for name, way in found.items() if way["seconds"]}


def attempt(name: str, way: Way, model_dir: Path, data: Path) -> tuple[Picks, float] | None:
    """None where it fails, which is printed: the others may work."""
    try:
        return way(model_dir, data)
    except Exception:
        traceback.print_exc()
        print(f"{name} failed, see above", flush=True)
        return None


def main(model_dir: Path, source: Path, out: Path, limit: int | None, repeats: int) -> None:
    rows = plain_scores.read(source)[:limit]
    ties: set[int] = set()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "test.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        ways: dict[str, Way] = {
            "plain": plainly,
            "lm_eval": by_lm_eval,
            "loraq": lambda model, file: by_loraq(model, file, ties),
        }
        for found in measure(ways, model_dir, data, repeats):
            result = result_of(found, rows, ties) | {"model": model_dir.name}
            (out / "likelihood.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["figures"], indent=1))


def result_of(found: dict[str, dict[str, Any]], rows: list[dict[str, Any]], ties: set[int]) -> dict[str, Any]:
    """The figures, and everything that they were made of."""
    picks = {name: way["picks"] for name, way in found.items()}
    best = {name: min(way["seconds"]) for name, way in found.items()}
    assert all(len(way) == len(rows) for way in picks.values()), "questions were left out"

    def differing(one: str, other: str) -> list[int]:
        return [number for number in range(len(rows)) if picks[one][number] != picks[other][number]]

    figures: dict[str, Any] = {"questions": len(rows)}
    if {"loraq", "plain"} <= found.keys():
        turned = differing("loraq", "plain")
        figures["speedup_vs_plain"] = round(best["plain"] / best["loraq"], 2)
        figures["picks_differing"] = len(turned)
        figures["picks_differing_not_ties"] = len(set(turned) - ties)
    if {"loraq", "lm_eval"} <= found.keys():
        figures["speedup_vs_lm_eval"] = round(best["lm_eval"] / best["loraq"], 2)
        turned = differing("loraq", "lm_eval")
        figures["picks_differing_from_lm_eval"] = len(turned)
        figures["picks_differing_from_lm_eval_not_ties"] = len(set(turned) - ties)
    if {"plain", "lm_eval"} <= found.keys():
        figures["picks_differing_of_plain_and_lm_eval"] = len(differing("plain", "lm_eval"))
    return {
        "figures": figures | {"ties": len(ties)},
        "machine": {
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": usage.versions() | {"lm_eval": version("lm_eval")},
        "ways": found,
        "ties": sorted(ties),
        "right": {
            name: sum(letter == row["answer_idx"] for letter, row in zip(way, rows, strict=True))
            for name, way in picks.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        main(chosen.model, chosen.data, chosen.out, chosen.limit, chosen.repeats)
