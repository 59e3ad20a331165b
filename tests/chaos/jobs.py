"""Batches for the chaos driver: trains, evaluations, a shared evaluation of the base model, a report."""

from __future__ import annotations

import random

from helpers import new_job

from jobqueue.spec import (
    DataSpec,
    EvaluateSpec,
    EvaluationSpec,
    LoraSpec,
    ReportSpec,
    ResourcesSpec,
    TrainingSpec,
    TrainSpec,
)
from jobqueue.store import NewJob

BATCHES_PER_BASE = 3  # that share an evaluation of their base model
BEAT_S = 0.05  # between two beats of tests/stub_trainer.py: one step each


def steps(base_model: str) -> int:
    """How many steps a trainer of that model does, see tests/stub_trainer.py."""
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


def batch(number: int, dice: random.Random) -> list[NewJob]:
    """Two trains of a few seconds with their evaluations, the base model's evaluation, and the report."""
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
    report = ReportSpec(batch=name).model_dump_json()
    follows = tuple(job.id for job in jobs)
    where = {"kind": "report", "device": "control", "queue": "control", "need": 0}
    jobs.append(new_job(f"{name}.report", batch=name, spec=report, follows=follows, **where, **own))
    return jobs
