"""Gradients that are too long, and training without clipping them."""

from __future__ import annotations

import pytest
from trainer_child import Child, train_spec

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "logging_steps": 1}  # each step is as long as its gradient


def losses(child: Child, max_grad_norm: float) -> list[float]:
    done = child.run(train_spec(training=SGD | {"max_grad_norm": max_grad_norm}))
    assert min(event.grad_norm for event in done.progress if event.grad_norm is not None) > 0.1, "as it was found"
    return [loss for _, loss, _ in done.outcome["losses"]]


def test_0_clips_nothing_and_little_clips_much(child: Child) -> None:
    unclipped = losses(child, 0)

    assert unclipped == losses(child, 1e6)
    clipped = losses(child, 1e-6)
    assert clipped[0] == unclipped[0]
    assert abs(clipped[-1] - unclipped[-1]) > 1e-3


@pytest.mark.parametrize("max_grad_norm", [0, 1e6])
def test_a_loss_that_is_no_number_is_found_without_clipping(child: Child, max_grad_norm: float) -> None:
    training = SGD | {"learning_rate": 1e30, "max_grad_norm": max_grad_norm, "max_steps": 50, "logging_steps": 50}

    done = child.run(train_spec(training=training))

    assert done.failure.reason == "nan_loss"
    assert max((event.step or 0 for event in done.progress), default=0) < 10
