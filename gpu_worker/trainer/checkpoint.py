"""Checkpoints: when one is written, what is in it beside what transformers writes, and how training goes on from it.

A checkpoint is written here as a folder of this machine and announced; the worker copies it into the storage and
completes it with a manifest, so that an attempt on any host finds a whole one or none.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gpu_worker.protocol import Checkpoint
from jobqueue.spec import TrainingSpec

COUNTS = "loraq.json"  # in the checkpoint: what was trained on so far
_asked = False  # by SIGUSR1, for the next step's end


def listen() -> None:
    """From now on SIGUSR1 asks for a checkpoint. To be called first of all: unheard, the signal would kill."""

    def ask(*_: object) -> None:
        global _asked
        _asked = True

    signal.signal(signal.SIGUSR1, ask)


class Checkpoints(TrainerCallback):
    """Asks transformers for a checkpoint every `save_steps` or `save_minutes`, and when SIGUSR1 has asked."""

    def __init__(
        self,
        training: TrainingSpec,
        counts: Callable[[], dict[str, float]],
        save_more: Sequence[Callable[[Path], None]],
        report: Callable[[Any], None],
    ) -> None:
        global _asked
        _asked = False  # for the job before, perhaps
        self._every_steps, self._every_s = training.save_steps, training.save_minutes * 60
        self._counts, self._save_more, self._report = counts, save_more, report
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._dtypes: dict[str, torch.dtype] = {}

    def remember_dtypes(self, model: Any) -> None:
        """Of what is trained, before a checkpoint is loaded: loading turns adapters of 16 bits into 32."""
        self._dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self._saved_step = state.global_step
        page(optimizer)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != self._dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(self._dtypes[name])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        by_steps = self._every_steps is not None and state.global_step - self._saved_step >= self._every_steps
        by_time = time.monotonic() - self._saved_at >= self._every_s
        if (by_steps or by_time or _asked) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        global _asked
        _asked = False
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / COUNTS).write_text(json.dumps(self._counts()))
        for save in self._save_more:
            save(folder)
        self._saved_at, self._saved_step = time.monotonic(), state.global_step
        self._report(Checkpoint(step=state.global_step, folder=str(folder)))


def page(optimizer: Any) -> None:
    """Put the state that a paged optimizer (bitsandbytes) has loaded into pages, as it does with what it makes itself.

    A checkpoint keeps the mark of being paged, and a tensor that was loaded may have it without being so: a step would
    then move pages that do not exist. Loaded by way of the host it loses the mark, and fills the GPU's memory instead.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has it in there
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in state.keys() & {"state1", "state2"}:
            state[name] = optimizer.get_state_buffer(parameter, dtype=state[name].dtype).copy_(state[name])


def counts_of(checkpoint: str) -> dict[str, float]:
    """What had been trained on when that checkpoint was written."""
    found: dict[str, float] = json.loads((Path(checkpoint) / COUNTS).read_text())
    return found
