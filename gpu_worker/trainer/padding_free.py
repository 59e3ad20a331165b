"""Whether the rows of a job's micro-batches lie end to end, or are padded."""

from __future__ import annotations

import logging
from typing import Any

from gpu_worker.trainer import model as models
from gpu_worker.trainer.apart import why_not
from gpu_worker.trainer.failures import bad_spec
from jobqueue.memory import Layout
from jobqueue.spec import Dtype, TrainingSpec

log = logging.getLogger("loraq.trainer")


def layout_of(training: TrainingSpec, model: Any, computed_in: Dtype | None = None) -> Layout:
    """How rows are to lie in a micro-batch of this job.

    Raises JobFailure (bad_spec) where the job asks for rows end to end and the model lets them see each other.
    """
    asked = training.packing or training.padding_free
    if asked is False or (asked == "auto" and not models.ON_GPU):  # a CPU would pay for the mask
        return "padded"
    by_unsloth = models.attends_by_row(model)
    before = models.packed_attention_calls()
    obstacle = why_not(model, models.dtype(computed_in))
    by_row, masked = (now - then for now, then in zip(models.packed_attention_calls(), before, strict=True))
    if obstacle and asked is True:
        option = "packing" if training.packing else "padding_free"
        raise bad_spec(f"training.{option}: this model cannot take rows end to end: {obstacle}; leave it out")
    if asked == "auto" and not obstacle and not by_unsloth and (masked or not by_row):
        obstacle = "attention would cost the square of all their tokens"
    if obstacle:
        log.info("rows are padded, not end to end: %s", obstacle)
        return "padded"
    log.info("rows lie end to end, without padding")
    return "flat" if by_unsloth else "masked"
