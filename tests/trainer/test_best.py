"""Early stopping, and the weights with the lowest validation loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_child import Child, Done, train_spec

from gpu_worker.trainer.best import Best
from jobqueue.spec import TrainingSpec

SPLIT = {"validation_split": 0.25, "limit": 40}
# So fast a rate that it gets worse soon.
RISING = {"max_steps": 60, "eval_steps": 2, "learning_rate": 3e-2, "logging_steps": 1, "save_steps": 7}


@pytest.fixture(scope="module")
def stopped(child: Child) -> Done:
    return child.run(train_spec(data=SPLIT, training=RISING | {"early_stopping_patience": 3}))


def adapter(done: Done) -> dict[str, torch.Tensor]:
    return dict(load_file(done.folder / "adapter" / "adapter_model.safetensors"))


def test_training_stops_when_the_validation_loss_rises_and_the_best_step_is_kept(child: Child, stopped: Done) -> None:
    training, validation = stopped.outcome["training"], stopped.outcome["validation"]
    losses = dict(map(tuple, validation["losses"]))
    assert training["steps"] < 60
    assert validation["best_step"] == validation["kept_step"] == min(losses, key=lambda step: losses[step])
    assert training["steps"] == validation["best_step"] + 6, "three validations in vain, each after two steps"
    assert training["stopped_early"].startswith(f"no better validation loss than {validation['best_loss']:.4f}")
    assert [path.name for path in (stopped.folder / "trainer").glob("best*")] == []

    same = RISING | {"max_steps": validation["best_step"], "lr_scheduler_type": "constant"}
    until = child.run(train_spec(data=SPLIT, training=same))
    again = child.run(train_spec(data=SPLIT, training=same | {"max_steps": 60, "early_stopping_patience": 3}))
    assert again.outcome["validation"]["kept_step"] == validation["best_step"] == until.outcome["training"]["steps"]
    assert all(torch.equal(adapter(again)[name], tensor) for name, tensor in adapter(until).items())


def test_an_attempt_that_goes_on_knows_the_best_so_far(child: Child, stopped: Done) -> None:
    best, last = stopped.outcome["validation"]["best_step"], stopped.checkpoints[-1]
    assert int(last.name.rpartition("-")[2]) > best, "the checkpoint is of a step after the best one"
    resumed = child.run(train_spec(data=SPLIT, training=RISING | {"early_stopping_patience": 3}), resume=last)
    assert resumed.outcome["training"]["resumed_from_step"] > best
    assert resumed.outcome["training"]["steps"] == stopped.outcome["training"]["steps"]
    assert resumed.outcome["validation"]["kept_step"] == best
    assert all(torch.equal(adapter(resumed)[name], tensor) for name, tensor in adapter(stopped).items())


def test_without_patience_all_steps_are_done_and_the_last_weights_kept_unless_the_best_are_asked_for(
    child: Child,
) -> None:
    short = RISING | {"max_steps": 12}
    last = child.run(train_spec(data=SPLIT, training=short)).outcome
    best = child.run(train_spec(data=SPLIT, training=short | {"load_best_model_at_end": True})).outcome
    assert last["validation"]["losses"] == best["validation"]["losses"]
    assert last["training"]["stopped_early"] is best["training"]["stopped_early"] is None
    assert last["validation"]["kept_step"] == 12 > best["validation"]["kept_step"] == best["validation"]["best_step"]


def run(losses: list[float], tmp_path: Path, **training: Any) -> tuple[Best, int]:
    """Validations with these losses; returns also after how many it stopped."""
    best = Best(TrainingSpec(eval_steps=1, **training), torch.nn.Linear(1, 1), tmp_path, validates=True)
    for step, loss in enumerate(losses, start=1):
        control = SimpleNamespace(should_training_stop=False, should_save=True)
        state = SimpleNamespace(global_step=step, max_steps=99)
        best.on_evaluate(None, state, control, metrics={"eval_loss": loss})
        if control.should_training_stop:
            assert not control.should_save, "a checkpoint of a training that has ended would train on"
            return best, step
    return best, 0


def test_patience_counts_validations_that_are_not_better_by_the_threshold(tmp_path: Path) -> None:
    losses = [1.0, 0.99, 0.98, 0.5, 0.6, float("nan"), 0.7]
    assert run(losses, tmp_path, early_stopping_patience=2)[1] == 6
    best, step = run(losses, tmp_path, early_stopping_patience=2, early_stopping_threshold=0.1)
    assert (step, best.step, best.loss) == (3, 3, 0.98), "the weights are the best ones all the same"
    assert run(losses, tmp_path)[1] == 0
