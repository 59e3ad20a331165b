"""Settled jobs -> which trial is better, by how much, and what it cost; pure.

Two models are compared on the questions that both were asked: the exact McNemar test (McNemar 1947; Dror et
al. 2018 recommend it for accuracy) looks only at those that one of them has right and the other wrong. The
p-values are those of single comparisons, not corrected for the best trial having been picked from many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from jobqueue.job import Batch, FailureReason, Job, JobKind, JobState
from jobqueue.verdict import verdict

Metric = Literal["likelihood", "likelihood_normalised", "generated"]
METRICS: tuple[Metric, ...] = ("likelihood", "likelihood_normalised", "generated")
PRIMARY: tuple[Metric, ...] = ("likelihood", "generated")
"""The order of trials follows the first of these that there is."""
SIGNIFICANT = 0.05
Picks = Mapping[str, Mapping[int, bool]]
"""Per evaluation job: question -> right or wrong, by the primary metric."""


@dataclass(frozen=True)
class Score:
    """How many of the questions a model has right."""

    correct: int
    questions: int
    accuracy: float  # 0 to 1
    interval: tuple[float, float]  # of the accuracy, 95%


@dataclass(frozen=True)
class Comparison:
    """One model against another, by the primary metric."""

    points: float  # difference of the accuracies in percentage points; positive: better than the other
    gained: int | None = None  # questions that it has right and the other wrong; None: not paired
    lost: int | None = None  # questions that it has wrong and the other right
    p_value: float | None = None  # of the exact McNemar test, two-sided

    @property
    def shown(self) -> bool | None:
        """Whether a difference is shown; None where it was not tested."""
        return None if self.p_value is None else self.p_value < SIGNIFICANT


@dataclass(frozen=True)
class BaseResult:
    """The base model's own scores."""

    job: str
    base_model: str
    load_in_4bit: bool
    state: JobState
    reason: FailureReason | None
    message: str
    scores: Mapping[Metric, Score]


@dataclass(frozen=True)
class TrialResult:
    """One configuration: what came out, and what it cost."""

    label: str
    differs: Mapping[str, Any]  # dotted key -> value, where the trials of the batch are not all alike
    job: str  # that trained it; in a batch without training, that evaluated it
    evaluation: str | None
    state: JobState  # of the evaluation, or of the training where it did not get there
    reason: FailureReason | None
    message: str
    attempts: int
    worker: str
    gpu: str
    scores: Mapping[Metric, Score]
    base: str | None  # the evaluation of the base model that it is compared with
    versus_base: Comparison | None
    peak_bytes: int | None  # reserved on the GPU at most
    training_bytes: int | None  # of them, what training took on top of the loaded model
    train_minutes: float | None
    tokens_per_s: float | None
    final_loss: float | None


@dataclass(frozen=True)
class BatchReport:
    """What came out of a batch, best trial first."""

    batch: str
    base_model: str
    complete: bool  # every job has ended
    metric: Metric | None  # that the order follows; None: nothing was evaluated yet
    questions: int | None
    bases: tuple[BaseResult, ...]
    trials: tuple[TrialResult, ...]
    versus_runner_up: Comparison | None
    verdict: str = field(default="")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> BatchReport:
        """What `to_dict` made, also by way of JSON. Raises ValueError where it is something else."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(dict(document))


def build_report(batch: Batch, jobs: Sequence[Job], picks: Picks = MappingProxyType({})) -> BatchReport:
    """Aggregate the jobs of a batch, of which some may not have ended.

    Args:
        batch: the batch.
        jobs: its jobs, evaluations of base models included.
        picks: the answers per evaluation job; without them differences are shown but not tested.
    """
    work = [job for job in jobs if job.kind is not JobKind.REPORT]
    evaluations = {job.spec["adapter_job"]: job for job in work if job.kind is JobKind.EVALUATE and not _is_base(job)}
    trains = sorted((job for job in work if job.kind is JobKind.TRAIN), key=lambda job: _number(batch, job))
    bases = [job for job in work if _is_base(job)]

    scored = {job.id: _scores(job) for job in [*evaluations.values(), *bases]}
    metric = next((m for m in PRIMARY if any(m in scores for scores in scored.values())), None)
    differs = _differs([(job, evaluations.get(job.id)) for job in trains] or [(job, None) for job in bases])
    trials = [
        _trial(job, evaluations.get(job.id), bases, scored, metric, picks, what)
        for job, what in zip(trains or bases, differs, strict=True)
    ]
    if metric is not None:
        trials.sort(key=lambda trial: -trial.scores[metric].accuracy if metric in trial.scores else math.inf)

    questions = {s[metric].questions for s in scored.values() if metric in s} if metric else set()
    versus_runner_up = _runner_up(trials, metric, picks, {job.id: job for job in work})
    complete = all(job.state.final for job in work)
    return BatchReport(
        batch=batch.name,
        base_model=batch.base_model,
        complete=complete,
        metric=metric,
        questions=max(questions, default=None),
        bases=tuple(_base(job, scored[job.id]) for job in bases) if trains else (),
        trials=tuple(trials),
        versus_runner_up=versus_runner_up,
        verdict=verdict(trials, metric, versus_runner_up, complete),
    )


def _is_base(job: Job) -> bool:
    return job.kind is JobKind.EVALUATE and job.spec.get("adapter_job") is None


def _number(batch: Batch, job: Job) -> int:
    """The place of a trial in the file: job ids end in it."""
    tail = job.id.removeprefix(f"{batch.name}.")
    return int(tail) if tail.isdecimal() else 0


def _scores(job: Job) -> dict[Metric, Score]:
    found: dict[Metric, Score] = {}
    for metric in METRICS:
        part = job.outcome.get(metric)
        questions = int(job.outcome.get("questions") or 0)
        if part and questions:
            correct = int(part["correct"])
            low, high = part.get("interval") or wilson(correct, questions)
            found[metric] = Score(correct, questions, correct / questions, (low, high))
    return found


def wilson(correct: int, questions: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): honest for few questions, and near 0 and 1."""
    z = 1.959963984540054
    share, scale = correct / questions, 1 + z * z / questions
    middle = (share + z * z / (2 * questions)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / questions + z * z / (4 * questions * questions))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(gained: int, lost: int) -> float | None:
    """Two-sided p-value of the exact test that `gained` and `lost` are equally likely; None without scipy."""
    if gained + lost == 0:
        return 1.0
    try:
        from scipy.stats import binomtest
    except ImportError:  # a laptop: the report that a worker made has it
        return None
    return float(binomtest(min(gained, lost), gained + lost, 0.5).pvalue)


def _compare(one: Score, other: Score, mine: Mapping[int, bool], theirs: Mapping[int, bool]) -> Comparison:
    """On the questions that both were asked: one may have left out some that were too long for it."""
    both = mine.keys() & theirs.keys()
    if not both:
        return Comparison(round(100 * (one.accuracy - other.accuracy), 6))
    gained = sum(mine[question] and not theirs[question] for question in both)
    lost = sum(theirs[question] and not mine[question] for question in both)
    return Comparison(round(100 * (gained - lost) / len(both), 6), gained, lost, mcnemar(gained, lost))


def _trial(
    job: Job,
    evaluation: Job | None,
    bases: Sequence[Job],
    scored: Mapping[str, Mapping[Metric, Score]],
    metric: Metric | None,
    picks: Picks,
    differs: Mapping[str, Any],
) -> TrialResult:
    asked = job if _is_base(job) else evaluation
    last = evaluation if evaluation is not None and job.state is JobState.SUCCEEDED else job
    scores = scored.get(asked.id, {}) if asked else {}
    base = _base_for(evaluation, bases) if evaluation else None
    versus_base = None
    if evaluation and base and metric and metric in scores and metric in scored[base.id]:
        mine, theirs = picks.get(evaluation.id, {}), picks.get(base.id, {})
        versus_base = _compare(scores[metric], scored[base.id][metric], mine, theirs)
    memory, time, training = (job.outcome.get(part) or {} for part in ("memory", "time", "training"))
    return TrialResult(
        label=_base_label(differs) if _is_base(job) else job.trial,
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
        train_minutes=_finite(time.get("train_minutes")),
        tokens_per_s=_finite(training.get("tokens_per_s")),
        final_loss=_finite(training.get("final_loss")),
    )


def _base_label(differs: Mapping[str, Any]) -> str:
    """Base evaluations serve many batches, so the label in their record may be that of another one."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in differs.items()) or "base model"


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _base(job: Job, scores: Mapping[Metric, Score]) -> BaseResult:
    return BaseResult(
        job=job.id,
        base_model=job.spec["base_model"],
        load_in_4bit=job.spec["load_in_4bit"],
        state=job.state,
        reason=job.reason,
        message=job.message,
        scores=scores,
    )


def _base_for(evaluation: Job, bases: Sequence[Job]) -> Job | None:
    """The base model under the same questions and precision; where there are several, the one most alike."""

    def same(base: Job, key: str) -> bool:
        return bool(base.spec.get(key) == evaluation.spec.get(key))

    fitting = [
        base
        for base in bases
        if same(base, "base_model") and same(base, "load_in_4bit") and _asked(base) == _asked(evaluation)
    ]
    return max(fitting, key=lambda base: (same(base, "max_seq_length"), same(base, "method")), default=None)


def _asked(evaluation: Job) -> dict[str, Any]:
    """What decides which questions are asked, and how; the rest changes the speed only."""
    speed = ("compare_with_base", "per_device_eval_batch_size")
    return {key: value for key, value in evaluation.spec["evaluation"].items() if key not in speed}


def _differs(runs: Sequence[tuple[Job, Job | None]]) -> list[dict[str, Any]]:
    """For each trial the dotted keys of its specs whose value is not the same in all of them."""
    flat = []
    for job, evaluation in runs:
        keys = dict(_flat(evaluation.spec)) if evaluation else {}
        flat.append({**keys, **dict(_flat(job.spec))})
        flat[-1].pop("adapter_job", None)
    names = dict.fromkeys(key for keys in flat for key in keys)
    varied = [key for key in names if any(keys.get(key) != flat[0].get(key) for keys in flat)]
    return [{key: keys.get(key) for key in varied} for keys in flat]


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def _runner_up(
    trials: Sequence[TrialResult], metric: Metric | None, picks: Picks, jobs: Mapping[str, Job]
) -> Comparison | None:
    """The best trial against the second; tested only where both were asked the same questions."""
    if metric is None:
        return None
    scored = [trial for trial in trials if metric in trial.scores and trial.evaluation]
    if len(scored) < 2:
        return None
    best, second = scored[:2]
    asked = [_asked(jobs[trial.evaluation]) for trial in (best, second) if trial.evaluation]
    comparable = asked[0] == asked[1]
    mine = picks.get(best.evaluation or "", {}) if comparable else {}
    theirs = picks.get(second.evaluation or "", {}) if comparable else {}
    return _compare(best.scores[metric], second.scores[metric], mine, theirs)
