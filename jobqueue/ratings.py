"""Scores from 1 to 5 that a judge, or people, gave to written answers: means, intervals, differences; pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from jobqueue import statistics
from jobqueue.comparison import Finding, finding

if TYPE_CHECKING:
    from jobqueue.results import BatchReport

Criterion = Literal["relevance", "accuracy", "fluency"]
CRITERIA: Mapping[Criterion, str] = {
    "relevance": "does it answer what was asked, and nothing else?",
    "accuracy": "is what it says right, by the reference answer and by what is known?",
    "fluency": "is it well-formed, readable language?",
}
LOWEST, HIGHEST = 1, 5
JUDGEMENTS = "judgements.jsonl"  # what a judging leaves: a line for each answer
OVERALL = "overall"  # the mean of the criteria
Scores = Mapping[int, Mapping[Criterion, float]]
"""Of one model, by the question's index: the mean over those who rated the answer."""


@dataclass(frozen=True)
class Mean:
    """Over the questions: of a score, or of the difference of two models' scores."""

    value: float
    interval: tuple[float, float]  # 95%, bootstrap over the questions


@dataclass(frozen=True)
class RatedModel:
    """How one model's answers were rated, and how that compares with its base model on the same questions."""

    job: str  # the evaluation in which it wrote them
    label: str
    answers: int
    means: Mapping[str, Mean]  # by criterion, and overall
    differences: Mapping[str, Mean] = field(default_factory=dict)  # the same, against the base model; none of that
    p_value: float | None = None  # of the Wilcoxon test of the overall differences, two-sided, by itself
    p_holm: float | None = None  # corrected for the models that were tested beside it
    finding: Finding = "not tested"


@dataclass(frozen=True)
class JudgeUsage:
    """What a judging took: all its judgements, also those that were at hand from before."""

    judgements: int  # an answer, rated once by one model
    reused: int  # of them, asked for by an earlier attempt or batch
    unusable: int  # no scores could be read, however often they were asked for; in none of the other figures
    retries: int  # requests that had to be sent again
    input_tokens: int
    output_tokens: int
    cost: float | None  # where prices are set for all models
    between_samples: float | None  # how far the samples of one model lie apart: highest less lowest, mean of all
    between_models: float | None  # the same between the judge's models


@dataclass(frozen=True)
class Ratings:
    """What a judge, or people, made of a batch's answers."""

    by: Literal["judge", "people"]
    raters: tuple[str, ...]  # models; names
    questions: int
    models: tuple[RatedModel, ...]  # best first, base models last
    agreement: Mapping[str, float | None] = field(default_factory=dict)  # of people: Krippendorff's alpha by criterion
    usage: JudgeUsage | None = None  # of a judge

    def of(self, job: str | None) -> RatedModel | None:
        """The model that wrote its answers in that evaluation."""
        return next((model for model in self.models if model.job == job), None)


@dataclass(frozen=True)
class Rated:
    """A model whose answers can be rated."""

    job: str  # its evaluation
    label: str
    base: str | None = None  # the evaluation of the base model that it is compared with


def rated_models(report: BatchReport) -> list[Rated]:
    """The trials and base models of a batch that were evaluated, in the report's order."""
    trials = [
        Rated(trial.evaluation, trial.label or "the only trial", trial.base)
        for trial in report.trials
        if trial.evaluation
    ]
    return trials + [Rated(base.job, base.shown_as) for base in report.bases]


def judge_ratings(report: BatchReport, outcome: Mapping[str, Any], lines: str) -> Ratings:
    """Of a judging's outcome and its `judgements.jsonl`. An answer's score is the mean over the judge's models."""
    scores: dict[str, dict[int, Mapping[Criterion, float]]] = {}
    for row in map(json.loads, lines.splitlines()):
        by_model = [average(samples) for samples in row["scores"].values()]
        scores.setdefault(row["job"], {})[row["index"]] = average(by_model)
    questions = {index for of_model in scores.values() for index in of_model}
    rated = rate(rated_models(report), scores)
    return Ratings("judge", tuple(outcome["models"]), len(questions), rated, usage=JudgeUsage(**outcome["usage"]))


def average(scores: Sequence[Mapping[Criterion, float]]) -> dict[Criterion, float]:
    """Of one answer's scores, criterion by criterion."""
    return {name: math.fsum(score[name] for score in scores) / len(scores) for name in CRITERIA}


def rate(models: Sequence[Rated], scores: Mapping[str, Scores]) -> tuple[RatedModel, ...]:
    """Means and paired differences of the models that have scores, best first, those that others compare with last."""
    found = [_rate(model, scores) for model in models if scores.get(model.job)]
    holm = iter(statistics.holm([model.p_value for model in found if model.p_value is not None]))
    found = [model if model.p_value is None else _corrected(model, next(holm)) for model in found]
    bases = {model.base for model in models}
    return tuple(sorted(found, key=lambda model: (model.job in bases, -model.means[OVERALL].value)))


def _rate(model: Rated, scores: Mapping[str, Scores]) -> RatedModel:
    mine, theirs = scores[model.job], scores.get(model.base or "", {})
    both = sorted(mine.keys() & theirs.keys())
    means = {name: _mean([_score(mine[index], name) for index in sorted(mine)]) for name in (OVERALL, *CRITERIA)}
    rated = RatedModel(model.job, model.label, len(mine), means)
    if not both:
        return rated
    changes = {
        name: [round(_score(mine[index], name) - _score(theirs[index], name), 9) for index in both]
        for name in (OVERALL, *CRITERIA)
    }
    differences = {name: _mean(values) for name, values in changes.items()}
    p_value = statistics.wilcoxon(changes[OVERALL])
    said = finding(differences[OVERALL].value, p_value)
    return replace(rated, differences=differences, p_value=p_value, finding=said)


def _corrected(model: RatedModel, p_holm: float) -> RatedModel:
    return replace(model, p_holm=p_holm, finding=finding(model.differences[OVERALL].value, p_holm))


def _score(given: Mapping[Criterion, float], name: str) -> float:
    values = [given[criterion] for criterion in CRITERIA if name in (OVERALL, criterion)]
    return math.fsum(values) / len(values)


def _mean(values: Sequence[float]) -> Mean:
    return Mean(round(math.fsum(values) / len(values), 6), statistics.bootstrap_mean(values))
