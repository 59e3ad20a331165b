"""Rows of a batch to tensors."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import Any

import torch

from jobqueue.tokens import IGNORED

KEPT_BACK = "kept_back"  # column of the rows that only validate
ROW_LENGTHS = "seq_lengths"  # column of packed sequences: tokens of each row in it; the name is TRL's


class Collator:
    """Pads rows on the right to the longest of the batch, or lays them end to end; remembers what each batch holds.

    Args:
        pad_token_id: any token; what is padded is masked.
        flat: end to end. Validations are padded all the same: transformers takes the mean over their batches by the
            size of the first dimension.
    """

    def __init__(self, pad_token_id: int, *, flat: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.flat = flat
        self.batches: deque[tuple[int, int, int]] = deque()  # rows, tokens, trained tokens; oldest first

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if KEPT_BACK in batch[0]:
            return self._padded(batch)
        rows = sum(len(_row_lengths(row)) for row in batch)
        trained = sum(label != IGNORED for row in batch for label in row["labels"])
        self.batches.append((rows, sum(len(row["input_ids"]) for row in batch), trained))
        return _end_to_end(batch) if self.flat else self._padded(batch)

    def _padded(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.full((len(batch), width), self.pad_token_id)
        labels = torch.full((len(batch), width), IGNORED)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for place, row in enumerate(batch):
            length = len(row["input_ids"])
            ids[place, :length] = torch.tensor(row["input_ids"])
            labels[place, :length] = torch.tensor(row["labels"])
            mask[place, :length] = 1  # by length, never by the pad id: pad may be eos
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}  # each (rows, width)


def _end_to_end(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """No mask: from positions that begin again transformers, from the lengths Unsloth sees where a row begins.

    The first label of a row is ignored already (jobqueue.tokens), so no row's last token predicts the next one.
    """
    lengths = [length for row in batch for length in _row_lengths(row)]
    return {
        "input_ids": torch.tensor([list(chain.from_iterable(row["input_ids"] for row in batch))]),  # (1, tokens)
        "labels": torch.tensor([list(chain.from_iterable(row["labels"] for row in batch))]),  # (1, tokens)
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],  # (1, tokens)
        "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32),  # (rows,)
    }


def _row_lengths(row: dict[str, Any]) -> list[int]:
    return row[ROW_LENGTHS] if ROW_LENGTHS in row else [len(row["input_ids"])]
