"""A sweep of four fine-tunes on MedQA, submitted to a real server and worked off by a real worker.

    python benchmarks/medqa_sweep.py MODEL_DIR TRAIN.jsonl.gz,VALIDATION.jsonl.gz TEST.jsonl.gz OUT_DIR [--steps 120]
        [--slots 1] [--ask "A question"]

Writes OUT_DIR/medqa_sweep.json (figures, machine, versions, every job), OUT_DIR/medqa_sweep.txt (the table as
`loraq results` prints it), OUT_DIR/report.json (for `ops/make_example.py`), and OUT_DIR/asked.txt (what base model and
best trial answer to the question). Beside it, on the same machine, the picks of `plain_scores.py`. On a host of several
GPUs, --gpu says which. With several slots trainings take longer each, and less together.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from session import Session, arguments

SWEEP = """\
name: medqa
base_model: {model}
data: {{source: train.jsonl}}
lora: {{lora_alpha: 16}}
training:
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
  max_steps: {steps}
evaluation: {{source: test.jsonl, per_device_eval_batch_size: 192, max_new_tokens: 40, limit: {limit}}}
sweep:
  grid:
    training.learning_rate: [1e-4, 4e-4]
    lora.r: [8, 32]
"""
BASES = """\
name: medqa-base
base_model: {model}
evaluation: {{source: test.jsonl, per_device_eval_batch_size: 192, max_new_tokens: 40, limit: {limit}}}
sweep:
  grid: {{evaluation.load_in_4bit: [true, false]}}
"""


def main() -> None:
    parser = arguments()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--limit", type=int, default=100_000)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--slots", default="1")
    parser.add_argument("--ask", metavar="QUESTION")
    options = parser.parse_args()
    device = ["--cpu"] if options.cpu else ["--gpu", options.gpu, "--slots", options.slots]
    with Session(options.out, device) as session:
        session.rows(options.train, "train.jsonl")
        test = session.rows(options.test, "test.jsonl")
        plain = session.folder / "plain.json"
        script = Path(__file__).with_name("plain_scores.py")
        # While the first trainer imports Unsloth: nothing is timed here.
        seen = {} if options.cpu else {"CUDA_VISIBLE_DEVICES": options.gpu}
        words = [sys.executable, script, options.model, test, plain]
        yardstick = subprocess.Popen(words, env={**os.environ, **seen})
        started = time.time()
        values = {"model": options.model.absolute(), "steps": options.steps, "limit": options.limit}
        session.submit("medqa", SWEEP.format(**values))
        session.submit("medqa-base", BASES.format(**values))
        for batch in ("medqa", "medqa-base"):
            session.wait(batch)
            print(f"{batch} ended after {time.time() - started:.0f} s", flush=True)
        minutes = (time.time() - started) / 60
        table = session.loraq("results", "medqa", COLUMNS="160")
        print(table)
        (options.out / "medqa_sweep.txt").write_text(table)
        jobs = session.jobs("medqa") + session.jobs("medqa-base")
        report = json.loads(session.loraq("results", "medqa", "--json"))
        (options.out / "report.json").write_text(json.dumps(report, indent=1))
        bases = json.loads(session.loraq("results", "medqa-base", "--json"))
        if yardstick.wait() != 0:
            sys.exit("plain_scores.py failed, see above")
        result = collect(jobs, report, bases, json.loads(plain.read_text()), session.storage, minutes)
        (options.out / "medqa_sweep.json").write_text(json.dumps(result, indent=1))
        print(json.dumps(result["figures"], indent=1), flush=True)
        if options.ask:
            best = report["trials"][0]["job"]  # medqa.2
            asked = session.loraq("ask", best.replace(".", "/"), options.ask, COLUMNS="120")
            (options.out / "asked.txt").write_text(asked)
            print(asked)


def collect(
    jobs: list[dict[str, Any]], report: Any, bases: Any, plain: dict[str, Any], storage: Path, minutes: float
) -> dict[str, Any]:
    """The figures, and everything that they were made of."""
    jobs = list({job["id"]: job for job in jobs}.values())
    evaluations = {job["id"]: job for job in jobs if job["kind"] == "evaluate" and job["state"] == "succeeded"}
    base = {e["spec"]["load_in_4bit"]: e for e in evaluations.values() if e["spec"]["adapter_job"] is None}
    tuned = [e["outcome"] for e in evaluations.values() if e["spec"]["adapter_job"]]
    best = max(tuned, key=lambda outcome: outcome["likelihood"]["accuracy"])
    lines = (storage / base[False]["outcome"]["folder"] / "questions.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    picks = [answer["picks"]["likelihood"] for answer in asked]
    differing = [
        answer for answer, pick in zip(asked, plain["picks"], strict=False) if answer["picks"]["likelihood"] != pick
    ]
    trains = [job["outcome"] for job in jobs if job["kind"] == "train" and job["state"] == "succeeded"]
    return {
        "figures": {
            "jobs_succeeded": sum(job["state"] == "succeeded" for job in jobs),
            "questions": len(picks),
            "base_likelihood_accuracy": base[False]["outcome"]["likelihood"]["accuracy"],
            "base_picks_differing": len(differing),
            "base_picks_differing_not_ties": sum("likelihood" not in answer["ties"] for answer in differing),
            "base_4bit_likelihood_accuracy": base[True]["outcome"]["likelihood"]["accuracy"],
            "best_likelihood_accuracy": best["likelihood"]["accuracy"],
            "base_answer_form_rate": base[True]["outcome"]["generated"]["answer_form"],
            "best_answer_form_rate": best["generated"]["answer_form"],
            "peak_reserved_gib": round(max(t["memory"]["peak_reserved_bytes"] for t in trains) / 2**30, 3),
        },
        "machine": {"gpu": trains[0]["memory"]["gpu"], "python": platform.python_version(), "cores": os.cpu_count()},
        "versions": trains[0]["versions"],
        "minutes": round(minutes, 1),
        "yardstick": {"accuracy": plain["accuracy"], "seconds": plain["seconds"]},
        "jobs_total": len(jobs),
        "report": report,
        "bases": bases,
        "jobs": jobs,
    }


if __name__ == "__main__":
    main()
