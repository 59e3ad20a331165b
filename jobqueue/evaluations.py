"""Evaluation jobs: what they asked, which of them compare, and what came out; pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jobqueue.job import Job, JobKind
from jobqueue.results import MEASURES, METRICS, Measure, Metric, Score
from jobqueue.statistics import wilson


def of_task(jobs: Iterable[Job]) -> list[Job]:
    """The evaluations of what was trained for; the others, some base models' among them, are of the original task."""
    every = [job for job in jobs if job.kind is JobKind.EVALUATE]
    found = [job for job in every if not (job.spec.get("original_task") or job.spec.get("from_adapter"))]
    wanted = [questions_of(job) for job in found if not is_base(job)]
    return found if len(found) == len(every) else [job for job in found if questions_of(job) in wanted]


def is_base(job: Job) -> bool:
    """Whether it asks the base model alone."""
    others = ("adapter_job", "members", "from_adapter")
    return job.kind is JobKind.EVALUATE and not any(job.spec.get(other) for other in others)


def questions_of(evaluation: Job) -> dict[str, Any]:
    """What decides which questions are asked, and how; the rest changes the speed only."""
    speed = ("compare_with_base", "per_device_eval_batch_size")
    return {key: value for key, value in evaluation.spec["evaluation"].items() if key not in speed}


def base_for(evaluation: Job, bases: Sequence[Job]) -> Job | None:
    """The base model under the same questions and precision; where there are several, the one most alike."""

    def same(base: Job, key: str) -> bool:
        return bool(base.spec.get(key) == evaluation.spec.get(key))

    model = ("base_model", "load_in_4bit", "dtype")
    fitting = [
        base
        for base in bases
        if all(same(base, key) for key in model) and questions_of(base) == questions_of(evaluation)
    ]
    alike = ("revision", "max_seq_length", "method")  # one commit may have been asked for under several names
    return max(fitting, key=lambda base: [same(base, key) for key in alike], default=None)


def scores_of(job: Job) -> dict[Metric, Score]:
    """The metrics of right and wrong answers that it has reported."""
    found: dict[Metric, Score] = {}
    for metric in METRICS:
        part = job.outcome.get(metric)
        questions = int(job.outcome.get("questions") or 0)
        if part and questions:
            correct = int(part["correct"])
            low, high = part.get("interval") or wilson(correct, questions)
            found[metric] = Score(correct, questions, correct / questions, (low, high))
    return found


def measures_of(job: Job | None) -> dict[Measure, float]:
    """The other metrics that it has reported."""
    parts = {measure: job.outcome.get(measure) or {} for measure in MEASURES} if job else {}
    return {measure: part[measure] for measure, part in parts.items() if finite(part.get(measure)) is not None}


def finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
