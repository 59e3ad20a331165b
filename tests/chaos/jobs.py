"""Batches for the chaos driver: trains, evaluations, a shared evaluation of the base model, a report.

Most are for stub trainers, to reach volume; a few train and ask a real model, the demo's, with Unsloth on the CPU.
"""

from __future__ import annotations

import random
from pathlib import Path

from helpers import new_job

from jobqueue.data_spec import DataSpec
from jobqueue.job_spec import EvaluateSpec, ReportSpec, TrainSpec
from jobqueue.spec import EvaluationSpec, LoraSpec, ResourcesSpec, TrainingSpec
from jobqueue.store import NewJob

BATCHES_PER_BASE = 3  # that share an evaluation of their base model
BEAT_S = 0.05  # between two beats of tests/stub_trainer.py: one step each
DEMO = Path(__file__).parents[2] / "cli" / "demo"
REAL_MODEL = str(DEMO / "model")
REAL_STEPS, REAL_QUESTIONS = 80, 8


def steps(base_model: str) -> int:
    """How many steps a stub trainer of that model does, see tests/stub_trainer.py."""
    seconds = next(float(word.removeprefix("sleep:")) for word in base_model.split("/") if word.startswith("sleep:"))
    return max(1, round(seconds / BEAT_S))


def train(job_id: str, batch: str, model: str, resources: ResourcesSpec | None = None, **where: object) -> NewJob:
    spec = TrainSpec(
        base_model=model,
        method="lora",
        data=DataSpec(source="nobody/reads-it"),
        lora=LoraSpec(),
        training=TrainingSpec(),
        resources=resources or ResourcesSpec(),
    )
    return new_job(job_id, kind="train", batch=batch, spec=spec.model_dump_json(), **where)


def evaluation(job_id: str, batch: str, model: str, adapter: str | None, **where: object) -> NewJob:
    spec = EvaluateSpec(
        base_model=model,
        method="lora",
        adapter_job=adapter,
        load_in_4bit=False,
        max_seq_length=64,
        evaluation=EvaluationSpec(source="nobody/reads-it"),
        resources=ResourcesSpec(),
    )
    return new_job(job_id, kind="evaluate", batch=batch, spec=spec.model_dump_json(), **where)


def real(name: str, **own: object) -> list[NewJob]:
    """A real train, whose losses are the same every time, and the evaluation of its adapter."""
    trained = TrainSpec(
        base_model=REAL_MODEL,
        method="lora",
        data=DataSpec(source=str(DEMO / "train.jsonl")),
        lora=LoraSpec(r=8),
        training=TrainingSpec(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_steps=REAL_STEPS,
            max_seq_length=256,
            logging_steps=1,
            save_steps=4,
        ),
        resources=ResourcesSpec(device="cpu"),
    )
    asked = EvaluateSpec(
        base_model=REAL_MODEL,
        method="lora",
        adapter_job=name,
        load_in_4bit=False,
        max_seq_length=256,
        evaluation=EvaluationSpec(source=str(DEMO / "test.jsonl"), limit=REAL_QUESTIONS, metrics=("likelihood",)),
        resources=ResourcesSpec(device="cpu"),
    )
    own = {"batch": name.partition(".")[0], "device": "cpu", "queue": "cpu", **own}
    return [
        new_job(name, kind="train", spec=trained.model_dump_json(), **own),
        new_job(f"{name}.eval", kind="evaluate", spec=asked.model_dump_json(), needs=(name,), **own),
    ]


def batch(number: int, dice: random.Random, real_every: int = 0) -> list[NewJob]:
    """Two trains of a few seconds with their evaluations, the base model's evaluation, and the report.

    In each `real_every`th batch a real train with its evaluation as well; 0: in none.
    """
    name, owner = f"b{number}", dice.choice(("ann", "bob"))
    own = {"owner": owner, "submission": f"s{number}"}
    jobs: list[NewJob] = []
    for trial in (f"{name}.1", f"{name}.2"):
        odd = dice.choice(("", "", "", "deaf/", "child/", "deaf/child/"))
        model = f"/stub/tiny-0.1B/{odd}sleep:{dice.choice((2, 3, 4, 5))}/save"
        place = dice.choice(({"device": "cpu", "queue": "cpu"}, {}, {"queue": "", "need": 0}))
        device = "cpu" if place.get("device") == "cpu" else "auto"
        jobs.append(train(trial, name, model, ResourcesSpec(device=device), **own, **place))
        model = f"/stub/tiny-0.1B/{odd}sleep:{dice.choice((0.5, 1, 2))}"
        jobs.append(evaluation(f"{trial}.eval", name, model, trial, needs=(trial,), **own))
    base = f"base-{number // BATCHES_PER_BASE:012x}"
    jobs.append(evaluation(base, "", "/stub/tiny-0.1B/sleep:1", None, **own))
    if real_every and number % real_every == 0:
        jobs += real(f"{name}.real", **own)
    report = ReportSpec(batch=name).model_dump_json()
    follows = tuple(job.id for job in jobs)
    where = {"kind": "report", "device": "control", "queue": "control", "need": 0}
    jobs.append(new_job(f"{name}.report", batch=name, spec=report, follows=follows, **where, **own))
    return jobs
