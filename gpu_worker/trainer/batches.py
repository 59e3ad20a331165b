"""Rows to data sets, and the order in which a training takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler
from trl import pack_dataset

from gpu_worker.trainer.collator import KEPT_BACK
from jobqueue.memory import Layout
from jobqueue.tokens import IGNORED, Tokens

log = logging.getLogger("loraq.trainer")


@dataclass(frozen=True)
class Batches:
    """What a training goes through, and how it is cut into micro-batches."""

    training: Dataset
    validation: Dataset
    layout: Layout
    tokens: int
    """Of a micro-batch, at most, padding included."""
    spared_tokens: int
    """A micro-batch of at most so many does without gradient checkpointing, where others need it."""

    @property
    def validation_rows(self) -> int:
        """Of a micro-batch of a validation, which is padded; 0: there is none."""
        return max(1, self.tokens // max(lengths(self.validation))) if len(self.validation) else 0


def mean_over_tokens(validation: Dataset) -> Callable[..., Any]:
    """What to put around the trainer's `prediction_step`: the loss of a validation is then the mean over its tokens.

    transformers takes the mean over rows, each with its batch's mean: another number with other sizes of batches, which
    trials of one sweep can have.
    """
    tokens = sum(label != IGNORED for labels in validation["labels"] for label in labels)

    def weighted(step: Any, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> tuple[Any, ...]:
        loss, *others = step(model, inputs, *more, **options)
        share = inputs["labels"].ne(IGNORED).sum() / tokens
        return loss * share * (len(validation) / len(inputs["labels"])), *others

    return weighted


def for_training(rows: Sequence[Tokens]) -> Dataset:
    """One entry for each row."""
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def for_validation(rows: Sequence[Tokens]) -> Dataset:
    """The same, marked as kept back."""
    return for_training(rows).add_column(KEPT_BACK, [True] * len(rows))


def packed(rows: Sequence[Tokens], max_seq_length: int) -> Dataset:
    """Entries of at most so many tokens, each of one or more whole rows: best fit, the longest rows first.

    All rows at once, so that the result depends on nothing but them.
    """
    found = pack_dataset(for_training(rows), max_seq_length, "bfd", map_kwargs={"batch_size": None})
    full = sum(len(row.input_ids) for row in rows) / (len(found) * max_seq_length)
    log.info("packing: %d rows in %d sequences of %d tokens, %.0f%% full", len(rows), len(found), max_seq_length,
             100 * full)  # fmt: skip
    return found


def lengths(data: Dataset) -> list[int]:
    """Tokens of each entry."""
    found: list[int] = pc.list_value_length(data.with_format("arrow")[:]["input_ids"]).to_pylist()
    return found


class LongestFirst(Sampler[int]):
    """Random entries, by seed and epoch as transformers takes them, but those of each optimizer step sorted by length:
    padded micro-batches then hold rows of similar length, and a step has the same rows and gradients as without.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, seed: int) -> None:
        self._lengths, self._step_rows = lengths, step_rows
        self._random = SeedableRandomSampler(range(len(lengths)), data_seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, also when a training goes on from a checkpoint."""
        self._random.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = list(self._random)
        for start in range(0, len(order), self._step_rows):
            yield from sorted(order[start : start + self._step_rows], key=self._lengths.__getitem__, reverse=True)

    def __len__(self) -> int:
        return len(self._lengths)

    def apply_to(self, trainer: Any) -> None:
        """From now on the trainer takes its rows in this order."""
        trainer._get_train_sampler = lambda *_: self
