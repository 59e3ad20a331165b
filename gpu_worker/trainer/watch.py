"""What a training is watched with: batches are counted, losses looked at, progress told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from gpu_worker.protocol import Checkpoint, Progress
from gpu_worker.trainer import usage
from gpu_worker.trainer.collator import Collator
from gpu_worker.trainer.failures import nan_loss

Report = Callable[[Progress | Checkpoint], None]
SILENCE_S = 2.0  # a running job says something at least this often (a step permitting)


class Watch(TrainerCallback):
    """Counts what was trained on, reports progress, and ends the job when the loss is no number."""

    def __init__(self, report: Report, collator: Collator) -> None:
        self.report = report
        self.collator = collator
        self.rows = self.tokens = self.trained_tokens = 0
        self.said_at = time.monotonic()
        self.said_tokens = 0
        self.began_at, self.seconds_before = self.said_at, 0.0

    def counts(self) -> dict[str, float]:
        """For a checkpoint: of this attempt and those that it went on from."""
        seconds = self.seconds_before + time.monotonic() - self.began_at
        return {
            "rows": self.rows, "tokens": self.tokens, "trained_tokens": self.trained_tokens, "seconds": seconds
        }  # fmt: skip

    def go_on(self, counts: dict[str, float]) -> None:
        """From what a checkpoint says."""
        self.rows, self.tokens = int(counts["rows"]), int(counts["tokens"])
        self.trained_tokens, self.seconds_before = int(counts["trained_tokens"]), counts["seconds"]
        self.said_tokens = self.tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began_at = self.said_at = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.collator.batches:
            return
        rows, tokens, trained_tokens = self.collator.batches.popleft()
        self.rows += rows
        self.tokens += tokens
        self.trained_tokens += trained_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_substep_end(args, state, control)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last loss, whatever logging_steps is
        logs_now = control.should_log or state.global_step == 1 or state.global_step % args.logging_steps == 0
        if not logs_now and time.monotonic() - self.said_at >= SILENCE_S:
            self._say(state, {})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self.said_at >= SILENCE_S:
            self._say(state, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise nan_loss(state.global_step)
        self._say(state, logs)

    def _say(self, state: Any, logs: dict[str, float]) -> None:
        now = time.monotonic()
        speed = (self.tokens - self.said_tokens) / max(now - self.said_at, 1e-9)
        self.said_at, self.said_tokens = now, self.tokens
        grad_norm = logs.get("grad_norm")
        self.report(
            Progress(
                "train",
                step=state.global_step,
                steps=state.max_steps,
                epoch=round(state.epoch or 0.0, 4),
                loss=logs.get("loss"),
                learning_rate=logs.get("learning_rate"),
                grad_norm=float(grad_norm) if grad_norm is not None and math.isfinite(grad_norm) else None,
                tokens_per_s=round(speed, 1),
                reserved_bytes=usage.reserved(),
            )
        )


def mean_loss(losses: list[list[float]]) -> float:
    """Over all steps, also those of attempts before: each logged loss is the mean since the one before it."""
    steps = [0, *(step for step, _, _ in losses)]
    sums = [loss * (step - before) for (step, loss, _), before in zip(losses, steps, strict=False)]
    return sum(sums) / steps[-1]
