"""A training that goes on from a checkpoint ends where the uninterrupted one does."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from safetensors.torch import load_file
from trainer_child import Child, Done, train_spec

from gpu_worker.protocol import Checkpoint, Progress, Result

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
    assert max(abs(a[1] - b[1]) for a, b in zip(before, after, strict=True)) < 1e-3
    assert [a[2] for a in after] == [b[2] for b in before], "the schedule of the learning rate goes on"
    assert training["mean_loss"] == pytest.approx(whole.outcome["training"]["mean_loss"], abs=1e-3)
    moved = sum(float((weights(resumed)[name] - tensor).norm() ** 2) for name, tensor in weights(whole).items())
    size = sum(float(tensor.norm() ** 2) for tensor in weights(whole).values())
    assert (moved / size) ** 0.5 < 0.01


def test_sigusr1_asks_for_a_checkpoint_at_the_end_of_the_step(child: Child) -> None:
    child.send(train_spec(training={"max_steps": 60, "logging_steps": 1}))
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
