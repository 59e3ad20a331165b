"""Gradient checkpointing of those micro-batches alone that need it: the others save a third of their operations."""

from __future__ import annotations

from typing import Any


def recompute_above(tokens: int, trainer: Any) -> None:
    """Of a training with gradient checkpointing, spare micro-batches of at most so many tokens; 0: none.

    Layers and models read the flag at each forward pass in training.
    """
    if not tokens:
        return
    training_step = trainer.training_step
    switched: list[Any] = []

    def by_size(model: Any, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        if not switched:  # not earlier: the trainer turns them on when it begins
            switched.extend(module for module in model.modules() if getattr(module, "gradient_checkpointing", False))
        for module in switched:
            module.gradient_checkpointing = inputs["input_ids"].numel() > tokens
        return training_step(model, inputs, *arguments, **more)

    trainer.training_step = by_size
