"""A training whose numbers are none any more ends as a failure, not as an adapter that has learned nothing."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_child import Child, train_spec
from transformers import Trainer, TrainingArguments

from gpu_worker.trainer.failures import JobFailure
from gpu_worker.trainer.finite import Finite
from jobqueue.job import FailureReason

NOT_FUSED, FUSED = "adamw_torch", "adamw_torch_fused"  # who leaves out a step: torch's scaler, or the optimizer


class Steep(torch.nn.Module):
    """The loss is a small number; on the way back the gradient grows by `steepness`, three times."""

    def __init__(self, steepness: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.normal_(self.layer.weight, std=1e-4)
        self.steepness = steepness

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.layer(x)
        for _ in range(3):
            hidden = hidden * self.steepness
        return {"loss": hidden.float().square().mean()}


def train(folder: Path, steepness: float, optim: str, steps: int, resume: Path | None = None) -> tuple[Any, Finite]:
    """In float16, as on a GPU: activations and their gradients in 16 bits, weights in 32, the loss scaled by torch."""
    options = TrainingArguments(
        str(folder), max_steps=steps, optim=optim, learning_rate=1e-4, lr_scheduler_type="constant", fp16=True,
        use_cpu=True, per_device_train_batch_size=2, save_steps=20, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"x": row} for row in torch.randn(200, 4, generator=torch.Generator().manual_seed(2)) / 100]
    finite = Finite("cpu")
    trainer = Trainer(Steep(steepness), options, train_dataset=rows, callbacks=[finite])
    trainer.training_step = partial(finite.look_at_loss, trainer.training_step)
    trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu"), True  # else GPUs only
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, finite


@pytest.mark.parametrize("optim", [NOT_FUSED, FUSED])
@pytest.mark.parametrize(("steps", "most"), [(60, 20), (5, 5)])
def test_gradients_that_are_never_numbers_in_float16_end_the_training_though_its_loss_is_fine(
    tmp_path: Path, optim: str, steps: int, most: int
) -> None:
    """unsloth#911: NaN gradients on a T4, a fine loss, each step left out, and nothing learned at the end."""
    with pytest.raises(JobFailure, match="gradients were NaN, or too large for float16") as failed:
        train(tmp_path, 1e3, optim, steps)

    assert failed.value.reason is FailureReason.NAN_LOSS
    found = re.search(r"until step (\d+)", str(failed.value))
    assert found is not None
    assert int(found[1]) <= most


@pytest.mark.parametrize("optim", [NOT_FUSED, FUSED])
def test_the_first_steps_in_float16_may_be_left_out_until_the_scale_fits(tmp_path: Path, optim: str) -> None:
    before = Steep(30.0).layer.weight.detach()

    trainer, finite = train(tmp_path, 30.0, optim, 40)

    assert 3 < int(finite._skipped) < 17
    assert trainer.state.global_step == 40
    assert (trainer.model.layer.weight.detach() - before).abs().max() > 1e-4, "as far as one step, at least"


def test_a_training_that_has_learned_before_may_end_with_steps_that_are_left_out(tmp_path: Path) -> None:
    train(tmp_path, 30.0, NOT_FUSED, 20)

    _, finite = train(tmp_path, 1e3, NOT_FUSED, 22, tmp_path / "checkpoint-20")

    assert int(finite._skipped) == 2


def test_weights_that_the_last_step_has_ruined_are_not_kept_where_better_ones_are(child: Child) -> None:
    """With load_best_model_at_end; the rate is 0 at the first step."""
    ruins = {"max_steps": 2, "learning_rate": 1e30, "weight_decay": 1e30, "warmup_steps": 1, "eval_steps": 1}
    split = {"validation_split": 0.25, "limit": 40}
    done = child.run(train_spec(data=split, training=ruins | {"load_best_model_at_end": True}))

    assert done.outcome["validation"]["kept_step"] == 1
    saved = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())

    done = child.run(train_spec(data=split, training=ruins))
    assert "the weights became NaN at step 2" in done.failure.message


def test_weights_that_the_last_step_has_ruined_are_not_saved(child: Child) -> None:
    """No loss has seen them."""
    done = child.run(train_spec(training={"max_steps": 1, "learning_rate": 1e30, "weight_decay": 1e30}))

    assert done.failure.reason == "nan_loss"
    assert "the weights became NaN at step 1" in done.failure.message
    assert not (done.folder / "adapter").exists()
