"""How the rows of an optimizer step are split into micro-batches: fast where the memory allows it; pure.

The effective batch is the user's and every split of it trains on the same rows per step with the same mean over their
tokens. The splits of a job stand in an order, its ladder, from the fastest to the one that needs least; an attempt that
ran out of memory is followed by one further down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jobqueue.memory import training_peak
from jobqueue.spec import TrainSpec

# Of one micro-batch: with more, a large GPU gains little and a checkpointed layer's memory still grows.
MOST_TOKENS = 16_384
OVER_ESTIMATE = 1.15  # a job that needs more than this over its estimate has run out of memory


@dataclass(frozen=True)
class Split:
    """One way to do an optimizer step."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    use_gradient_checkpointing: bool | Literal["unsloth"]

    def of(self, spec: TrainSpec) -> TrainSpec:
        """The spec, done so."""
        sizes = {
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
        checkpointing = {"use_gradient_checkpointing": self.use_gradient_checkpointing}
        return spec.model_copy(
            update={
                "training": spec.training.model_copy(update=sizes),
                "lora": spec.lora.model_copy(update=checkpointing),
            }
        )


@dataclass(frozen=True)
class Choice:
    """A rung of the ladder."""

    rung: int
    split: Split
    estimated_bytes: int  # peak on the GPU; 0 where it cannot be told
    last: bool  # nothing smaller is left


def ladder(spec: TrainSpec, row_tokens: int) -> list[Split]:
    """The splits of a job whose longest row has so many tokens, the fastest first."""
    asked, training = spec.lora.use_gradient_checkpointing, spec.training
    effective = training.effective_batch
    largest = training.per_device_train_batch_size
    if training.auto_find_batch_size:
        largest = _divisor(effective, min(effective, max(1, MOST_TOKENS // row_tokens)))
    sizes = list(_halved(largest, effective))
    if asked == "auto":
        options: list[tuple[int, bool | Literal["unsloth"]]] = [(largest, False)]
        options += [(size, "unsloth") for size in sizes]
    else:
        options = [(size, asked) for size in sizes]
    return [Split(size, effective // size, checkpointing) for size, checkpointing in options]


def choose(
    spec: TrainSpec,
    row_tokens: int,
    rung: int,
    *,
    config: Mapping[str, Any] | None = None,
    budget_bytes: int | None = None,
    correction: float = 1.0,
) -> Choice | None:
    """The fastest split that fits, not above `rung`; the last one where none is thought to fit.

    Args:
        spec: of the job.
        row_tokens: how long its longest row is, cut as it will be.
        rung: where the ladder begins for this attempt.
        config: the base model's.
        budget_bytes: what the job may take. Where this or the config is not known, the split is the user's own.
        correction: measured peak over estimate, of jobs like this one.

    Returns None where the ladder has ended.
    """
    splits = ladder(spec, row_tokens)
    choices = [
        Choice(place, split, _estimate(split.of(spec), row_tokens, config, correction), place == len(splits) - 1)
        for place, split in enumerate(splits)
    ]
    for choice in choices[rung:]:
        if choice.estimated_bytes and budget_bytes is not None:
            fits = choice.estimated_bytes <= budget_bytes
        else:
            fits = _asks_no_more(choice.split, spec)
        if fits or choice.last:
            return choice
    return None


def limit(estimated_bytes: int, budget_bytes: int | None, *, ran_out: bool) -> int | None:
    """What a job holds itself to, so that its neighbours can have the rest: somewhat more than the estimate.

    `ran_out`: memory has run out before. Then the estimate may be wrong, and only what the job was given is a limit.
    """
    if budget_bytes is None or ran_out or not estimated_bytes:
        return budget_bytes
    return min(budget_bytes, int(estimated_bytes * OVER_ESTIMATE))


def _estimate(spec: TrainSpec, row_tokens: int, config: Mapping[str, Any] | None, correction: float) -> int:
    try:
        return int(training_peak(config, spec, row_tokens) * correction) if config is not None else 0
    except (KeyError, TypeError):  # a config of another kind than `Shape` knows
        return 0


def _asks_no_more(split: Split, spec: TrainSpec) -> bool:
    own = spec.lora.use_gradient_checkpointing
    recomputes_as_asked = split.use_gradient_checkpointing == ("unsloth" if own == "auto" else own)
    return recomputes_as_asked and split.per_device_train_batch_size <= spec.training.per_device_train_batch_size


def _halved(size: int, effective: int) -> Iterator[int]:
    """`size`, then each time the largest divisor of the effective batch that is at most half of the one before."""
    while size >= 1:
        yield size
        size = _divisor(effective, size // 2)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; 0 where that is 0."""
    return next((size for size in range(most, 0, -1) if number % size == 0), 0)
