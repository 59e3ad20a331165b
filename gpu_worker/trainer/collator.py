"""Rows of a batch to tensors."""

from __future__ import annotations

from collections import deque

import torch

from jobqueue.tokens import IGNORED

KEPT_BACK = "kept_back"  # column of the rows that only validate


class Collator:
    """Pads rows on the right to the longest of the batch; remembers what each batch holds."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.batches: deque[tuple[int, int, int]] = deque()  # rows, tokens, trained tokens; oldest first

    def __call__(self, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.full((len(batch), width), self.pad_token_id)
        labels = torch.full((len(batch), width), IGNORED)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for place, row in enumerate(batch):
            length = len(row["input_ids"])
            ids[place, :length] = torch.tensor(row["input_ids"])
            labels[place, :length] = torch.tensor(row["labels"])
            mask[place, :length] = 1  # by length, never by the pad id: pad may be eos
        if KEPT_BACK not in batch[0]:
            self.batches.append((len(batch), int(mask.sum()), int((labels != IGNORED).sum())))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}  # each (rows, width)
