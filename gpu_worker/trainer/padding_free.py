"""Rows end to end in one sequence: whether a model keeps them apart, found out by trying, and whether that pays."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch

from gpu_worker.trainer import model as models
from gpu_worker.trainer.collator import Collator
from gpu_worker.trainer.failures import bad_spec, one_line
from jobqueue.memory import Layout
from jobqueue.spec import TrainingSpec

log = logging.getLogger("loraq.trainer")
FIRST, SECOND = 24, 16  # tokens of the rows that are tried
# Of the spread of the scores. With another row before it a row's own are the same numbers; alone, they are rounded
# otherwise in 16 bits. A row that is seen, or positions that go on counting, change them by about their spread.
SEEN, MISPLACED = 0.01, 0.1


def layout_of(training: TrainingSpec, model: Any) -> Layout:
    """How rows are to lie in a micro-batch of this job.

    Raises JobFailure (bad_spec) where the job asks for rows end to end and the model lets them see each other.
    """
    asked = training.packing or training.padding_free
    if asked is False or (asked == "auto" and not models.ON_GPU):  # a CPU pays for the mask
        return "padded"
    by_unsloth = models.attends_by_row(model)
    fast, masked = models.packed_attention_calls()
    obstacle = _obstacle(model)
    fast_now, masked_now = models.packed_attention_calls()
    if asked == "auto" and not obstacle and not by_unsloth and (fast_now == fast or masked_now > masked):
        obstacle = "attention would cost the square of all their tokens here"
    if obstacle and asked == "auto":
        log.info("rows are padded, not end to end: %s", obstacle)
        return "padded"
    if obstacle:
        option = "packing" if training.packing else "padding_free"
        raise bad_spec(f"training.{option}: this model cannot take rows end to end: {obstacle}; leave it out")
    log.info("rows lie end to end, without padding")
    return "flat" if by_unsloth else "masked"


def _obstacle(model: Any) -> str:
    """Why the model cannot take rows end to end; "" where it can."""
    of = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    one, other, row = (
        torch.randint(vocabulary, (length,), generator=of).tolist() for length in (FIRST, FIRST, SECOND)
    )  # fmt: skip
    trains = model.training
    model.eval()  # without dropout
    try:
        after_one, after_other, alone = (_scores(model, rows) for rows in ([one, row], [other, row], [row]))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is: padded rows may do
        return one_line(f"{type(error).__name__}: {error}")
    finally:
        model.train(trains)
    spread = alone.std()
    if not (after_one - after_other).abs().max() <= SEEN * spread:
        return "a row sees the one before it"
    if not (after_one - alone).abs().mean() <= MISPLACED * spread:
        return "a row is read as if it stood further on"
    return ""


def _scores(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """The logits at the last row, (SECOND, vocabulary), in 32 bits."""
    batch = Collator(0, flat=True)([{"input_ids": row, "labels": row} for row in rows])
    del batch["labels"]
    on_gpu = model.device.type == "cuda"
    with torch.no_grad(), torch.autocast("cuda", models.dtype()) if on_gpu else nullcontext():
        # A cache of keys and values would make transformers forget where rows begin.
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).logits
    scores: torch.Tensor = logits[0, -SECOND:].float()
    return scores
