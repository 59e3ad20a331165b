"""A training that goes on from a checkpoint ends where the uninterrupted one does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from safetensors.torch import load_file
from trainer_child import Child, Done, train_spec
from transformers import Trainer, TrainingArguments

from gpu_worker.protocol import Checkpoint, Progress, Result
from gpu_worker.trainer.checkpoint import Checkpoints
from jobqueue.spec import TrainingSpec

STEPS = {"max_steps": 12, "save_steps": 5, "logging_steps": 1}
RANDOM: dict[str, dict[str, Any]] = {  # so that the random numbers matter too
    "dropout": {"training": STEPS, "lora": {"lora_dropout": 0.1}},
    "noise": {"training": STEPS | {"neftune_noise_alpha": 15.0}},
}


@pytest.fixture(scope="module", params=RANDOM)
def spec(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Twelve steps of eight rows out of forty: the data is gone through more than twice."""
    return train_spec(method="qlora", data={"limit": 40}, **RANDOM[request.param])


@pytest.fixture(scope="module")
def whole(child: Child, spec: dict[str, Any]) -> Done:
    return child.run(spec)


def weights(done: Done) -> dict[str, Any]:
    return dict(load_file(done.folder / "adapter" / "adapter_model.safetensors"))


def test_checkpoints_are_written_every_so_many_steps(whole: Done) -> None:
    assert [folder.name for folder in whole.checkpoints] == ["checkpoint-5", "checkpoint-10"]
    assert whole.outcome["training"]["resumed_from_step"] is None


@pytest.mark.parametrize("place", [0, 1])
def test_losses_weights_and_counts_are_those_of_the_uninterrupted_run(
    child: Child, spec: dict[str, Any], whole: Done, place: int
) -> None:
    """transformers#40500: a resume failed at the state of the random numbers, under weights_only."""
    resumed = child.run(spec, resume=whole.checkpoints[place])

    training = resumed.outcome["training"]
    assert training["resumed_from_step"] == (5, 10)[place]
    assert (training["steps"], training["rows"]) == (12, 96)
    assert training["tokens"] == whole.outcome["training"]["tokens"]
    before, after = whole.outcome["losses"], resumed.outcome["losses"]
    assert [step for step, _, _ in after] == [step for step, _, _ in before]
    assert max(abs(a[1] - b[1]) for a, b in zip(before, after, strict=True)) < 1e-6
    assert [a[2] for a in after] == [b[2] for b in before], "the schedule of the learning rate goes on"
    assert training["mean_loss"] == pytest.approx(whole.outcome["training"]["mean_loss"], abs=1e-6)
    moved = sum(float((weights(resumed)[name] - tensor).norm() ** 2) for name, tensor in weights(whole).items())
    size = sum(float(tensor.norm() ** 2) for tensor in weights(whole).values())
    assert (moved / size) ** 0.5 < 1e-6, "what a checkpoint keeps in 32 bits is not rounded to bf16"


def test_sigusr1_asks_for_a_checkpoint_at_the_end_of_the_step(child: Child) -> None:
    child.send(train_spec(training={"max_steps": 60, "logging_steps": 1, "gradient_accumulation_steps": 1}))
    steps: list[int] = []
    while len(steps) < 3:
        event = child.next_event()
        if isinstance(event, Progress) and event.phase == "train":
            steps.append(event.step or 0)
    os.kill(child.process.pid, signal.SIGUSR1)

    while not isinstance(event, (Checkpoint, Result)):
        event = child.next_event()

    assert isinstance(event, Checkpoint), "it came before the job's end"
    assert steps[-1] <= event.step < 60
    while not isinstance(event, Result):
        event = child.next_event()


class Wide(torch.nn.Module):
    """Large enough for its optimizer's state to be paged, and to be in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(400, 400, bias=False)

    def forward(self, x: Any) -> dict[str, Any]:
        return {"loss": (self.layer(x) - 1).square().mean()}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Stands for the CUDA driver: what was given out as paged, by its address; nothing else can be moved."""
    given: dict[int, Any] = {}

    def get_state_buffer(_optimizer: Any, p: Any, dtype: Any = torch.float32) -> Any:
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged, buffer.page_deviceid = True, 0  # as get_paged() marks what it has from the driver
        given[buffer.data_ptr()] = buffer
        return buffer

    def cprefetch(pointer: Any, *_: Any) -> None:
        if pointer.value not in given:
            raise RuntimeError("Error invalid argument")

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(bitsandbytes.functional, "lib", SimpleNamespace(cprefetch=cprefetch))
    return given


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_8bit"])
def test_a_paged_optimizer_goes_on_with_its_state_in_pages(tmp_path: Path, pages: dict[int, Any], optim: str) -> None:
    """bitsandbytes#782: a resume failed, as loaded state said that it was paged, and was not."""
    rows = [{"x": row} for row in torch.randn(24, 400, generator=torch.Generator().manual_seed(2))]

    def trained(resume: Path | None) -> tuple[Any, Any]:
        checkpoints = Checkpoints(TrainingSpec(save_steps=4), dict, (), lambda _: None)
        options = TrainingArguments(
            str(tmp_path), max_steps=6, optim=optim, learning_rate=1e-2, per_device_train_batch_size=4, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(Wide(), options, train_dataset=rows, callbacks=[checkpoints])
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer.model.layer.weight.detach(), trainer.optimizer.state[trainer.model.layer.weight]

    whole, state = trained(None)
    checkpoint = tmp_path / "checkpoint-4"
    kept = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"][0]
    marked = [tensor for part in (kept, *kept.values()) if isinstance(part, dict) for tensor in part.values()]
    assert any(getattr(tensor, "is_paged", False) for tensor in marked), "the mark is in the checkpoint"

    resumed, state_after = trained(checkpoint)
    assert torch.equal(resumed, whole)
    for name in {"state1", "state2"} & state.keys():
        assert state_after[name].data_ptr() in pages
        assert torch.equal(state_after[name], state[name])
