"""What trainings have made forgotten: each adapter's original task against what its training began with; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jobqueue.answers import Answers
from jobqueue.comparison import compare, corrected
from jobqueue.evaluations import base_for, measures_of, scores_of
from jobqueue.job import Job, JobKind
from jobqueue.results import PRIMARY, OriginalTask, TrialResult


def with_original_task(
    trials: Sequence[TrialResult], jobs: Sequence[Job], answers: Mapping[str, Answers]
) -> list[TrialResult]:
    """The trials, each with its original task before and after; those comparisons are tested as one family too.

    Args:
        jobs: all of the batch.
        answers: per evaluation job.
    """
    trains = {job.id: job for job in jobs if job.kind is JobKind.TRAIN}
    after = {job.spec["adapter_job"]: job for job in jobs if job.spec.get("original_task")}
    untrained = [job for job in jobs if job.kind is JobKind.EVALUATE and not job.spec.get("adapter_job")]
    untrained = [job for job in untrained if not job.spec.get("members")]
    found: list[OriginalTask | None] = []
    for trial in trials:
        job = after.get(trial.job)
        if job is None:
            found.append(None)
            continue
        start = trains[trial.job].spec.get("from_adapter")
        before = base_for(job, [one for one in untrained if one.spec.get("from_adapter") == start])
        found.append(_original(job, before, answers))
    versus = corrected([one.versus_before if one else None for one in found])
    return [
        replace(trial, original=replace(one, versus_before=compared) if one else None)
        for trial, one, compared in zip(trials, found, versus, strict=True)
    ]


def _original(job: Job, begun: Job | None, answers: Mapping[str, Answers]) -> OriginalTask:
    now, before = scores_of(job), scores_of(begun) if begun else {}
    metric = next((metric for metric in PRIMARY if metric in now), None)
    versus = None
    if metric and begun and metric in before:
        mine, theirs = answers.get(job.id, {}), answers.get(begun.id, {})
        versus = compare(now[metric].accuracy, before[metric].accuracy, mine, theirs, metric)
    return OriginalTask(
        evaluation=job.id,
        before=begun.id if begun else None,
        state=job.state,
        reason=job.reason,
        message=job.message,
        metric=metric,
        scores=now,
        scores_before=before,
        versus_before=versus,
        measures=measures_of(job),
        measures_before=measures_of(begun),
    )
