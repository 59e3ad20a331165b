"""The best weights so far by the validation loss, and when to stop for want of better ones."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from jobqueue.spec import TrainingSpec

WEIGHTS, STATE = "best.safetensors", "best.json"


class Best(TrainerCallback):
    """Stops as transformers' EarlyStoppingCallback does, without its checkpoints in the output folder: here those are
    moved away as they are written. What is trained is kept in a file of its own, which goes into each checkpoint."""

    def __init__(self, training: TrainingSpec, model: Any, folder: Path, *, validates: bool) -> None:
        self._validates = validates
        self._patience, self._threshold = training.early_stopping_patience, training.early_stopping_threshold
        self._keeps, self._model, self._folder = training.keeps_best, model, folder
        self.step, self.loss = 0, math.inf
        self._in_vain = 0  # validations in a row without a better loss
        self._last_step = 0
        self.seconds = 0.0  # that validations took, of this attempt
        self.stopped = ""  # why, in words; "" while there is no reason to

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validates and state.global_step >= state.max_steps:
            control.should_evaluate = True  # at the end, whatever eval_steps is

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        loss = more["metrics"]["eval_loss"]
        self.seconds += more["metrics"].get("eval_runtime", 0.0)
        self._in_vain = 0 if loss < self.loss - self._threshold else self._in_vain + 1
        if loss < self.loss:
            self.step, self.loss = state.global_step, loss
            self._keep()
        self._last_step = state.global_step
        if self._patience and self._in_vain >= self._patience and state.global_step < state.max_steps:
            self.stopped = (
                f"no better validation loss than {self.loss:.4f} (step {self.step}) "
                f"at {self._in_vain} validations in a row"
            )
            control.should_training_stop, control.should_save = True, False

    def _keep(self) -> None:
        if not self._keeps:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        new = self._folder / f"{WEIGHTS}.new"
        save_file({name: p.detach().contiguous() for name, p in self._trained()}, new)
        new.replace(self._folder / WEIGHTS)  # a checkpoint that links the one before keeps it

    def save(self, checkpoint: Path) -> None:
        """Into a checkpoint, so that an attempt that goes on from it knows what was best."""
        if self.step == 0:
            return
        (checkpoint / STATE).write_text(json.dumps({"step": self.step, "loss": self.loss, "in_vain": self._in_vain}))
        if self._keeps:
            _link(self._folder / WEIGHTS, checkpoint / WEIGHTS)

    def go_on(self, checkpoint: Path) -> None:
        """From what a checkpoint says; one without a validation says nothing."""
        if not (checkpoint / STATE).exists():
            return
        state = json.loads((checkpoint / STATE).read_text())
        self.step, self.loss, self._in_vain = state["step"], state["loss"], state["in_vain"]
        if self._keeps:
            self._folder.mkdir(parents=True, exist_ok=True)
            _link(checkpoint / WEIGHTS, self._folder / WEIGHTS)

    def restore(self) -> bool:
        """Give the model its best weights, where the last ones are others. Returns whether it did."""
        file = self._folder / WEIGHTS
        restores = self._keeps and 0 < self.step < self._last_step
        if restores:
            kept = load_file(file)
            with torch.no_grad():
                for name, parameter in self._trained():
                    parameter.copy_(kept[name])
        file.unlink(missing_ok=True)
        return restores

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]


def _link(file: Path, to: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    to.unlink(missing_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
