"""Gradient checkpointing of those micro-batches alone that need it: the others save a third of their operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def recompute_above(tokens: int) -> Callable[..., Any]:
    """Of a training with gradient checkpointing, spare micro-batches of at most so many tokens; 0: none.

    Layers and models read the flag at each forward pass in training.
    """
    switched: list[Any] = []

    def by_size(step: Any, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        if tokens and not switched:  # not earlier: the trainer turns them on when it begins
            switched.extend(module for module in model.modules() if getattr(module, "gradient_checkpointing", False))
        for module in switched:
            module.gradient_checkpointing = inputs["input_ids"].numel() > tokens
        return step(model, inputs, *more)

    return by_size
