"""Ends a training soon after its loss is no number any more, whatever `logging_steps` is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from gpu_worker.trainer.failures import nan_loss


class Finite(TrainerCallback):
    """Remembers on the device whether a loss was NaN or infinite, and reads what has arrived of that on the host.

    Nothing waits for the GPU: a step that runs ahead of it sees the flag a step or two later.
    """

    def __init__(self, device: Any) -> None:
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        self._seen = torch.zeros((), dtype=torch.bool, pin_memory=self._broken.is_cuda)

    def watch(self, trainer: Any) -> None:
        """From now on every loss of the trainer is looked at."""
        training_step = trainer.training_step

        def watched(*arguments: Any, **more: Any) -> Any:
            loss = training_step(*arguments, **more)
            self._broken |= ~torch.isfinite(loss.detach()).all().to(self._broken.device)
            return loss

        trainer.training_step = watched

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if bool(self._seen):
            raise nan_loss(state.global_step)
        self._seen.copy_(self._broken, non_blocking=True)
        if not self._broken.is_cuda and bool(self._seen):
            raise nan_loss(state.global_step)
