"""What came out of a batch: which trial is better, by how much, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from jobqueue.answers import ChangedQuestion, Confusion
from jobqueue.comparison import Comparison
from jobqueue.job import FailureReason, JobState
from jobqueue.ratings import Ratings

Metric = Literal["likelihood", "likelihood_normalised", "generated"]
METRICS: tuple[Metric, ...] = ("likelihood", "likelihood_normalised", "generated")
PRIMARY: tuple[Metric, ...] = ("likelihood", "generated")
"""The order of trials follows the first of these that there is."""
Measure = Literal["perplexity", "bleu"]
MEASURES: tuple[Measure, ...] = ("perplexity", "bleu")
"""Of whole texts, not of questions; where there is no metric, the order follows the first of them."""


@dataclass(frozen=True)
class Score:
    """How many of the questions a model has right."""

    correct: int
    questions: int
    accuracy: float  # 0 to 1
    interval: tuple[float, float]  # of the accuracy, 95%


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
    gpu_minutes: float = 0.0  # once, for all batches that are compared with it
    measures: Mapping[Measure, float] = field(default_factory=dict)  # perplexity; BLEU, 0 to 100
    dtype: str | None = None

    @property
    def shown_as(self) -> str:
        """As tables show it."""
        precision = ["4-bit" if self.load_in_4bit else "16-bit", *([self.dtype] if self.dtype else [])]
        return f"base model ({', '.join(precision)})"


@dataclass(frozen=True)
class OriginalTask:
    """What a trial still can of what could be done before it was trained."""

    evaluation: str  # job
    before: str | None  # job that asked what its training began with: an earlier adapter, else the base model
    state: JobState
    reason: FailureReason | None
    message: str
    metric: Metric | None  # of the comparison
    scores: Mapping[Metric, Score]
    scores_before: Mapping[Metric, Score]
    versus_before: Comparison | None
    measures: Mapping[Measure, float] = field(default_factory=dict)
    measures_before: Mapping[Measure, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportResult:
    """What was written of a trial, and how close its answers are to the adapter's."""

    job: str
    state: JobState
    reason: FailureReason | None
    message: str
    folder: str  # in the storage, "" where there is none
    exports: tuple[Mapping[str, Any], ...]  # as the job's outcome has them: format, path, difference, ...


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
    peak_bytes: int | None  # reserved on the GPU at most (on the CPU: resident)
    training_bytes: int | None  # of them, what training took on top of the loaded model
    train_minutes: float | None
    tokens_per_s: float | None
    final_loss: float | None
    total_bytes: int | None = None  # of the GPU
    start_bytes: int | None = None  # reserved before training, by the loaded model
    peak_percent: float | None = None  # of the total
    training_percent: float | None = None  # of the total
    train_seconds: float | None = None
    gpu_minutes: float = 0.0  # of all attempts, loading and evaluation included
    cost: float | None = None  # of them, where a price per GPU hour is set
    losses: tuple[tuple[int, float], ...] = ()  # step, mean loss since the point before
    measures: Mapping[Measure, float] = field(default_factory=dict)  # perplexity; BLEU, 0 to 100
    export: ExportResult | None = None
    members: tuple[str, ...] = ()  # of an ensemble: the labels of its trials
    versus_single: Comparison | None = None  # of an ensemble, against the best trial
    original: OriginalTask | None = None  # where the batch has an original task
    validation_loss: float | None = None  # of the weights that were kept, on the rows that were kept back

    @property
    def by_measure(self) -> tuple[float, ...]:
        """Sorts the best first: a low perplexity, then a high BLEU, then a low validation loss."""
        loss = math.inf if self.validation_loss is None else self.validation_loss
        return (self.measures.get("perplexity", math.inf), -self.measures.get("bleu", -math.inf), loss)


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
    verdict: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted key -> value, where all trials are alike
    confusions: tuple[Confusion, ...] = ()  # of the best trial and its base model
    changed: tuple[ChangedQuestion, ...] = ()  # between the two
    judge: Ratings | None = None  # of written answers, by a language model
    people: Ratings | None = None  # the same, by those who filled in score cards
    problems: tuple[str, ...] = ()  # what else of the batch has failed, a line each

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> BatchReport:
        """What `to_dict` made, also by way of JSON. Raises ValueError where it is something else."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(dict(document))

    def priced(self, price: float | Mapping[str, float] | None) -> BatchReport:
        """With what each trial cost, at a price per GPU hour: one, or by a part of the GPU's name."""
        trials = (replace(trial, cost=_cost(trial, price)) for trial in self.trials)
        return replace(self, trials=tuple(trials))


def _cost(trial: TrialResult, price: float | Mapping[str, float] | None) -> float | None:
    """None where there is no price of this GPU; a CPU has one only by its name."""
    if isinstance(price, Mapping):
        fitting = [name for name in price if name.lower() in trial.gpu.lower()]
        price = price[max(fitting, key=len)] if fitting and trial.gpu else None
    elif trial.gpu in ("", "cpu"):
        price = None
    return None if price is None or not trial.gpu_minutes else round(price * trial.gpu_minutes / 60, 4)
