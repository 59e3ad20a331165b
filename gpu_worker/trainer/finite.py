"""Ends a training soon after its numbers are none any more, whatever `logging_steps` is."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from gpu_worker.trainer.failures import nan_gradients, nan_loss, nan_weights

log = logging.getLogger("loraq.trainer")


class Finite(TrainerCallback):
    """Remembers on the device whether a loss was NaN or infinite, and in float16 whether gradients always are; reads
    what has arrived of that on the host.

    Nothing waits for the GPU: a step that runs ahead of it sees the flags a step or two later.
    """

    def __init__(self, device: Any) -> None:
        self._one = torch.ones((), device=device)
        self._broken = torch.zeros(2, dtype=torch.bool, device=device)  # a loss, the gradients
        self._seen = torch.zeros(2, dtype=torch.bool, pin_memory=self._broken.is_cuda)
        self._skipped = torch.zeros((), dtype=torch.int32, device=device)  # steps of this attempt
        self._scaler: Any = None

    def look_at_loss(self, step: Any, *arguments: Any) -> Any:
        loss = step(*arguments)
        self._broken[0] |= ~torch.isfinite(loss.detach()).all().to(self._broken.device)
        return loss

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._scaler = getattr(optimizer, "scaler", None)
        if self._scaler is not None:
            self._scale = self._scaler.scale(self._one)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state.global_step)
        if self._scaler is not None:
            self._look_at_scale()
        self._seen.copy_(self._broken, non_blocking=True)
        if not self._broken.is_cuda:
            self._tell(state.global_step)

    def _look_at_scale(self) -> None:
        """In float16 the loss is scaled up, so that small gradients are not lost. Where that makes a gradient infinite,
        torch leaves out the step and halves the scale. Below 1 the scale is not to blame any more.

        A fused optimizer leaves out the step by itself, and then neither accelerate nor transformers knows.
        """
        scale = self._scaler.scale(self._one)
        self._skipped += scale < self._scale
        self._broken[1] |= scale < 1
        self._scale = scale

    def _tell(self, step: int) -> None:
        loss, gradients = self._seen.tolist()
        if loss:
            raise nan_loss(step)
        if gradients:
            raise nan_gradients(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen.copy_(self._broken)
        self._tell(state.global_step)
        skipped = int(self._skipped)
        if skipped:
            log.info("%d steps were left out: in float16 a gradient was infinite or NaN", skipped)
        if 0 < skipped == state.global_step:
            raise nan_gradients(state.global_step)


def check_weights(model: Any, step: int) -> None:
    """Raises JobFailure where what is to be saved is not all numbers: what the last `step` has done is in no loss."""
    trained = [torch.isfinite(p).all() for p in model.parameters() if p.requires_grad]
    if not bool(torch.stack(trained).all()):
        raise nan_weights(step)
