"""The jobs of a batch -> its report; pure: the same jobs and answers give the same report, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from jobqueue import ensembles
from jobqueue.answers import Answers, changed, confusion
from jobqueue.comparison import Comparison, compare, corrected
from jobqueue.differences import differences
from jobqueue.evaluations import base_for, finite, is_base, measures_of, of_task, questions_of, scores_of
from jobqueue.job import Batch, Job, JobKind, JobState
from jobqueue.original_task import with_original_task
from jobqueue.results import (
    PRIMARY,
    BaseResult,
    BatchReport,
    ExportResult,
    Metric,
    Score,
    TrialResult,
)  # fmt: skip
from jobqueue.verdict import verdict

MOST_POINTS = 200  # of a loss curve in a report; the training job's outcome has all


def build_report(
    batch: Batch, jobs: Sequence[Job], answers: Mapping[str, Answers] = MappingProxyType({})
) -> BatchReport:
    """Aggregate the jobs of a batch, of which some may not have ended.

    Args:
        batch: the batch.
        jobs: its jobs, evaluations of base models included.
        answers: per evaluation job; without them differences are shown but not tested.
    """
    work = [job for job in jobs if job.kind is not JobKind.REPORT]
    of_the_task = of_task(work)
    evaluations = {job.spec["adapter_job"]: job for job in of_the_task if job.spec.get("adapter_job")}
    originals = {job.spec["adapter_job"]: job for job in work if job.spec.get("original_task")}
    exports = {job.spec["adapter_job"]: job for job in work if job.kind is JobKind.EXPORT}
    votes = ensembles.voted(jobs, answers)
    answers = {**answers, **{job.id: voted for job, voted in votes}}
    together = [job for job in work if job.spec.get("members")] + [job for job, _ in votes]
    trains = sorted((job for job in work if job.kind is JobKind.TRAIN), key=lambda job: _number(batch, job))
    bases = [job for job in of_the_task if is_base(job)]

    scored = {job.id: scores_of(job) for job in [*evaluations.values(), *together, *bases]}
    metric = next((m for m in PRIMARY if any(m in scores for scores in scored.values())), None)
    runs = [(job, evaluations.get(job.id)) for job in trains] or [(job, None) for job in bases]
    settings, differs = differences([(job, evaluation, originals.get(job.id)) for job, evaluation in runs])
    trials = [
        _trial(job, evaluation, exports.get(job.id), bases, scored, metric, answers, what)
        for (job, evaluation), what in zip(runs, differs, strict=True)
    ]
    by_id = {job.id: job for job in [*work, *together]}
    trials += [_ensemble(job, trials, by_id, bases, scored, metric, answers) for job in together]
    tested = corrected([*(trial.versus_base for trial in trials), *(trial.versus_single for trial in trials)])
    trials = [
        replace(trial, versus_base=versus_base, versus_single=versus_single)
        for trial, versus_base, versus_single in zip(trials, tested[: len(trials)], tested[len(trials) :], strict=True)
    ]
    trials = with_original_task(trials, work, answers)
    if metric is None:
        trials.sort(key=lambda trial: trial.by_measure)
    else:
        trials.sort(key=lambda trial: -trial.scores[metric].accuracy if metric in trial.scores else math.inf)

    questions = {s[metric].questions for s in scored.values() if metric in s} if metric else set()
    versus_runner_up = _runner_up(trials, metric, answers, by_id)
    complete = all(job.state.final for job in work)
    report = BatchReport(
        batch=batch.name,
        base_model=batch.base_model,
        complete=complete,
        metric=metric,
        questions=max(questions, default=None),
        bases=tuple(_base(job, scored[job.id]) for job in bases) if trains else (),
        trials=tuple(trials),
        versus_runner_up=versus_runner_up,
        verdict=verdict(trials, metric, versus_runner_up, complete, {job.id: measures_of(job) for job in bases}),
        settings=settings,
        problems=tuple(
            map(_problem, (job for job in work if job.kind is JobKind.JUDGE and job.state is JobState.FAILED))
        ),
    )
    return _with_questions(report, answers)


def _with_questions(report: BatchReport, answers: Mapping[str, Answers]) -> BatchReport:
    """What the best trial and its base model answered, where the answers are at hand."""
    best = report.trials[0] if report.trials else None
    if best is None or report.metric is None or report.metric not in best.scores:
        return report
    asked = [(best.base or "", "base model"), (best.evaluation or "", best.label or "the only trial")]
    confusions = [confusion(job, label, answers[job], report.metric) for job, label in asked if job in answers]
    base, tuned = (answers.get(job, {}) for job, _ in asked)
    return replace(report, confusions=tuple(confusions), changed=changed(base, tuned, report.metric))


def _problem(job: Job) -> str:
    return f"{job.id} failed ({job.reason}): {job.message}"


def _number(batch: Batch, job: Job) -> int:
    """The place of a trial in the file: job ids end in it."""
    tail = job.id.removeprefix(f"{batch.name}.")
    return int(tail) if tail.isdecimal() else 0


def _trial(
    job: Job,
    evaluation: Job | None,
    export: Job | None,
    bases: Sequence[Job],
    scored: Mapping[str, Mapping[Metric, Score]],
    metric: Metric | None,
    answers: Mapping[str, Answers],
    differs: Mapping[str, Any],
) -> TrialResult:
    asked = job if job.kind is JobKind.EVALUATE else evaluation
    last = evaluation if evaluation is not None and job.state is JobState.SUCCEEDED else job
    scores = scored.get(asked.id, {}) if asked else {}
    base = base_for(asked, bases) if asked and not is_base(asked) else None
    versus_base = None
    if asked and base and metric and metric in scores and metric in scored[base.id]:
        mine, theirs = answers.get(asked.id, {}), answers.get(base.id, {})
        versus_base = compare(scores[metric].accuracy, scored[base.id][metric].accuracy, mine, theirs, metric)
    memory, time, training = (job.outcome.get(part) or {} for part in ("memory", "time", "training"))
    return TrialResult(
        label=_base_label(differs) if is_base(job) else job.trial,
        differs=differs,
        job=job.id,
        evaluation=asked.id if asked else None,
        state=last.state,
        reason=last.reason,
        message=last.message,
        attempts=job.attempt,
        worker=job.worker,
        gpu=str(memory.get("gpu") or ""),
        scores=scores,
        base=base.id if base else None,
        versus_base=versus_base,
        peak_bytes=memory.get("peak_reserved_bytes"),
        training_bytes=memory.get("peak_for_training_bytes"),
        train_minutes=finite(time.get("train_minutes")),
        tokens_per_s=finite(training.get("tokens_per_s")),
        final_loss=finite(training.get("final_loss")),
        total_bytes=memory.get("total_bytes"),
        start_bytes=memory.get("reserved_at_start_bytes"),
        peak_percent=memory.get("peak_percent"),
        training_percent=memory.get("peak_for_training_percent"),
        train_seconds=finite(time.get("train_s")),
        gpu_minutes=_minutes(job, evaluation, export),
        measures=measures_of(asked),
        losses=thinned([(step, loss) for step, loss, *_ in job.outcome.get("losses") or ()], MOST_POINTS),
        export=_export(export) if export else None,
        validation_loss=finite(ensembles.validation_loss(job)),
    )


def _export(job: Job) -> ExportResult:
    made = tuple(job.outcome.get("exports") or ())
    return ExportResult(job.id, job.state, job.reason, job.message, job.outcome.get("folder", ""), made)


def _ensemble(
    job: Job,
    trials: Sequence[TrialResult],
    jobs: Mapping[str, Job],
    bases: Sequence[Job],
    scored: Mapping[str, Mapping[Metric, Score]],
    metric: Metric | None,
    answers: Mapping[str, Answers],
) -> TrialResult:
    """A row as a trial has, and the comparison with the best of the trials that were asked the same."""
    members = job.spec["members"]
    trains = [jobs[train] for train in members["trains"]]
    with suppress(ValueError):  # too few have succeeded, or not yet
        trains = ensembles.chosen(trains, members["best"])
    row = _trial(job, None, None, bases, scored, metric, answers, {})
    of_training = (field.name for field in fields(row) if field.name.endswith(("_bytes", "_percent")))
    untrained: dict[str, Any] = dict.fromkeys(of_training)
    row = replace(row, **untrained, members=tuple(train.trial or train.id for train in trains))
    rivals = [
        trial
        for trial in trials
        if metric in trial.scores and questions_of(jobs[trial.evaluation or ""]) == questions_of(job)
    ]
    if metric is None or metric not in row.scores or not rivals:
        return row
    best = max(rivals, key=lambda trial: trial.scores[metric].accuracy)
    mine, theirs = answers.get(job.id, {}), answers.get(best.evaluation or "", {})
    versus = compare(row.scores[metric].accuracy, best.scores[metric].accuracy, mine, theirs, metric)
    return replace(row, versus_single=versus)


def _base_label(differs: Mapping[str, Any]) -> str:
    """Base evaluations serve many batches, so the label in their record may be that of another one."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in differs.items()) or "base model"


def _base(job: Job, scores: Mapping[Metric, Score]) -> BaseResult:
    return BaseResult(
        job=job.id,
        base_model=job.spec["base_model"],
        load_in_4bit=job.spec["load_in_4bit"],
        state=job.state,
        reason=job.reason,
        message=job.message,
        scores=scores,
        gpu_minutes=_minutes(job),
        measures=measures_of(job),
        dtype=job.spec.get("dtype"),
    )


def _minutes(*jobs: Job | None) -> float:
    """Of all their ended attempts."""
    attempts = [attempt for job in jobs if job is not None for attempt in job.history]
    seconds = math.fsum(attempt["ended_at"] - attempt["claimed_at"] for attempt in attempts)
    return round(seconds / 60, 3)


def thinned(points: Sequence[tuple[int, float]], most: int) -> tuple[tuple[int, float], ...]:
    """A loss curve of at most `most` points: each the mean of its neighbours, at the last one's step."""
    size = max(1, -(-len(points) // most))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple((part[-1][0], round(math.fsum(loss for _, loss in part) / len(part), 6)) for part in parts)


def _runner_up(
    trials: Sequence[TrialResult], metric: Metric | None, answers: Mapping[str, Answers], jobs: Mapping[str, Job]
) -> Comparison | None:
    """The best trial against the second; tested only where both were asked the same questions.

    That they were picked as the best two of many needs no correction: Hung and Fithian (2019), Rank verification for
    exponential families.
    """
    if metric is None:
        return None
    scored = [trial for trial in trials if metric in trial.scores and trial.evaluation]
    if len(scored) < 2:
        return None
    best, second = scored[:2]
    asked = [questions_of(jobs[trial.evaluation]) for trial in (best, second) if trial.evaluation]
    comparable = asked[0] == asked[1]
    mine = answers.get(best.evaluation or "", {}) if comparable else {}
    theirs = answers.get(second.evaluation or "", {}) if comparable else {}
    return compare(best.scores[metric].accuracy, second.scores[metric].accuracy, mine, theirs, metric)
