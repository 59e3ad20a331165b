"""How the rows of an optimizer step are split into micro-batches: fast where the memory allows it; pure.

The effective batch is the user's and every split of it trains on the same rows per step with the same mean over their
tokens. The splits of a job stand in an order, its ladder, from the fastest to the one that needs least; an attempt that
ran out of memory is followed by one further down.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, Literal

from jobqueue.job_spec import TrainSpec
from jobqueue.memory import Layout, training_peak

# Of one micro-batch: with more, a large GPU gains little and a checkpointed layer's memory still grows.
MOST_TOKENS = 16_384
OVER_ESTIMATE = 1.15  # a job that needs more than this over its estimate has run out of memory


@dataclass(frozen=True)
class Split:
    """One way to do an optimizer step."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    use_gradient_checkpointing: bool | Literal["unsloth"]
    spares_short: bool = False
    """Micro-batches that are short enough to fit as they are do without checkpointing."""

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
    tokens: int  # of a micro-batch, at most, padding included
    estimated_bytes: int  # peak on the GPU; 0 where it cannot be told
    last: bool  # nothing smaller is left
    spared_tokens: int = 0  # a micro-batch of at most so many does without gradient checkpointing, where others need it


def most_tokens(lengths: Sequence[int], rows: int, layout: Layout) -> int:
    """What a micro-batch of so many of the rows can hold, padding included; `lengths`: the longest first."""
    return rows * lengths[0] if layout == "padded" else sum(lengths[:rows])


def ladder(spec: TrainSpec, lengths: Sequence[int], layout: Layout) -> list[Split]:
    """The splits of a job with such rows (packed: sequences), the fastest first; `lengths`: the longest first."""
    asked, training = spec.lora.use_gradient_checkpointing, spec.training
    effective = training.effective_batch
    largest = training.per_device_train_batch_size
    if training.auto_find_batch_size:
        divisors = (size for size in range(effective, 1, -1) if effective % size == 0)
        largest = next((size for size in divisors if most_tokens(lengths, size, layout) <= MOST_TOKENS), 1)
    sizes = list(_halved(largest, effective))
    if asked == "auto":
        first = [Split(largest, effective // largest, False), Split(largest, effective // largest, "unsloth", True)]
        return [*first, *(Split(size, effective // size, "unsloth") for size in sizes)]
    return [Split(size, effective // size, asked) for size in sizes]


def choose(
    spec: TrainSpec,
    lengths: Sequence[int],
    rung: int,
    *,
    layout: Layout = "padded",
    config: Mapping[str, Any] | None = None,
    budget_bytes: int | None = None,
    correction: float = 1.0,
) -> Choice | None:
    """The fastest split that fits, not above `rung`; the last one where none is thought to fit.

    Args:
        spec: of the job.
        lengths: tokens of each row, cut as it will be (packed: of each sequence).
        rung: where the ladder begins for this attempt.
        layout: how rows lie in a micro-batch.
        config: the base model's.
        budget_bytes: what the job may take. Where this or the config is not known, the split is the user's own.
        correction: measured peak over estimate, of jobs like this one.

    Returns None where the ladder has ended.
    """
    longest = heapq.nlargest(spec.training.effective_batch, lengths)
    splits = ladder(spec, longest, layout)
    for place, split in enumerate(splits[rung:], rung):
        tokens = most_tokens(longest, split.per_device_train_batch_size, layout)

        def needed(tokens: int, split: Split = split) -> int:
            return int(_estimate(split.of(spec), tokens, layout, config) * correction)

        choice = Choice(place, split, tokens, needed(tokens), last=place == len(splits) - 1)
        if not choice.estimated_bytes or budget_bytes is None:
            fits = _asks_no_more(split, spec)
        elif split.spares_short:
            of_short = partial(needed, split=replace(split, use_gradient_checkpointing=False))
            spared = bisect_right(range(1, tokens), budget_bytes, key=of_short)
            estimated = max(choice.estimated_bytes, of_short(spared))
            choice = replace(choice, spared_tokens=spared, estimated_bytes=estimated)
            # Else it would hardly happen.
            fits = spared >= fmean(lengths) * split.per_device_train_batch_size and estimated <= budget_bytes
        else:
            fits = choice.estimated_bytes <= budget_bytes
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


def _estimate(spec: TrainSpec, tokens: int, layout: Layout, config: Mapping[str, Any] | None) -> int:
    try:
        return training_peak(config, spec, tokens, layout) if config is not None else 0
    except (KeyError, TypeError):  # a config of another kind than `Shape` knows
        return 0


def _asks_no_more(split: Split, spec: TrainSpec) -> bool:
    if split.spares_short:
        return False
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
