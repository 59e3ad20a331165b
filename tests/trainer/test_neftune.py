"""Noise on the embeddings: each row by its own length, in training steps alone, and drawn once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from trainer_child import Child, Done, train_spec
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_worker.trainer.collator import ROW_LENGTHS, Collator
from gpu_worker.trainer.failures import JobFailure
from gpu_worker.trainer.neftune import Noise

ALPHA, WIDTH, LENGTHS = 5.0, 32, (40, 3, 12)
STEPS = {"max_steps": 3, "logging_steps": 1}


def make_model() -> Any:
    """A small one, in training."""
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).train()


def training_step(model: Any, inputs: dict[str, Any]) -> Any:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach()


def batch_of(layout: str) -> dict[str, torch.Tensor]:
    rows = [{"input_ids": [*range(5, 5 + n)], "labels": [*range(5, 5 + n)]} for n in LENGTHS]
    if layout == "packed":
        together = {name: rows[0][name] + rows[1][name] for name in rows[0]} | {ROW_LENGTHS: list(LENGTHS[:2])}
        rows = [together, rows[2]]
    return Collator(0, flat=layout != "padded")(rows)


@contextmanager
def embedded(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the model's first layer gets, for each forward pass in the block."""
    seen: list[torch.Tensor] = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach().clone()))
    yield seen
    hook.remove()


def noise_of_rows(model: Any, batch: dict[str, torch.Tensor], seen: torch.Tensor) -> list[torch.Tensor]:
    """What was added to each row, padding left out."""
    added = seen - model.get_input_embeddings().weight.detach()[batch["input_ids"]]
    if "attention_mask" in batch:
        return [row[:length] for row, length in zip(added, LENGTHS, strict=True)]
    return list(added[0].split(LENGTHS))


@pytest.mark.parametrize("layout", ["padded", "end to end", "packed"])
def test_each_row_gets_noise_by_its_own_length(layout: str) -> None:
    model, batch = make_model(), batch_of(layout)
    noise = Noise(ALPHA, model)
    with embedded(model) as seen:
        noise.on_embeddings(training_step, model, batch)
        noise.on_embeddings(training_step, model, batch)

    assert len(seen) == 2
    first, second = (noise_of_rows(model, batch, one) for one in seen)
    for row, again, length in zip(first, second, LENGTHS, strict=True):
        most = ALPHA / (length * WIDTH) ** 0.5
        assert 0.9 * most < float(row.abs().max()) <= 1.0001 * most
        assert float(row.std()) == pytest.approx(most / 3**0.5, rel=0.15), "uniform"
        assert abs(float(row.mean())) < 0.2 * most
        assert not torch.equal(row, again)


@pytest.mark.parametrize("fails", [False, True])
def test_outside_of_training_steps_there_is_none(fails: bool) -> None:
    model, batch = make_model(), batch_of("padded")
    weight = model.get_input_embeddings().weight.detach().clone()
    noise = Noise(ALPHA, model)

    def failing(model: Any, inputs: dict[str, Any]) -> Any:
        training_step(model, inputs)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck") if fails else nullcontext():
        noise.on_embeddings(failing if fails else training_step, model, batch)
    with embedded(model) as seen, torch.no_grad():
        model(**batch)
        model.eval()(**batch)

    assert len(seen) == 2
    for one in seen:
        assert torch.equal(one, weight[batch["input_ids"]])
    assert torch.equal(model.get_input_embeddings().weight, weight)


def test_without_an_alpha_there_is_none() -> None:
    model, batch = make_model(), batch_of("padded")
    noise = Noise(None, model)
    with embedded(model) as seen:
        loss = noise.on_embeddings(training_step, model, batch)

    assert torch.equal(seen[0], model.get_input_embeddings().weight[batch["input_ids"]])
    assert loss == training_step(model, batch)


def test_a_model_that_passes_by_its_embeddings_is_refused_not_trained_without_noise() -> None:
    model, batch = make_model(), batch_of("padded")
    weight = model.get_input_embeddings().weight

    def past(model: Any, inputs: dict[str, Any]) -> Any:
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        return training_step(model, {"inputs_embeds": weight[inputs["input_ids"]], **others})

    with pytest.raises(JobFailure, match=r"training\.neftune_noise_alpha: this model does not call"):
        Noise(ALPHA, model).on_embeddings(past, model, batch)


# -- whole trainings


def losses(done: Done) -> list[float]:
    return [loss for _, loss, _ in done.outcome["losses"]]


@pytest.fixture(scope="module")
def plain(child: Child) -> list[float]:
    return losses(child.run(train_spec(training=STEPS)))


@pytest.fixture(scope="module")
def noisy(child: Child) -> list[float]:
    spec = train_spec(training=STEPS | {"neftune_noise_alpha": 15.0}, lora={"use_gradient_checkpointing": False})
    return losses(child.run(spec))


def differences(one: list[float], other: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("checkpointing", [True, "unsloth"])
def test_losses_are_the_same_from_the_same_seed_also_where_activations_are_computed_again(
    child: Child, noisy: list[float], checkpointing: bool | str
) -> None:
    """Noise drawn again would end in other gradients, and in other noise afterwards."""
    training = STEPS | {"neftune_noise_alpha": 15.0}
    again = child.run(train_spec(training=training, lora={"use_gradient_checkpointing": checkpointing}))

    assert losses(again) == pytest.approx(noisy, abs=1e-4)


def test_losses_are_others_from_another_alpha_and_seed(child: Child, plain: list[float], noisy: list[float]) -> None:
    weaker = losses(child.run(train_spec(training=STEPS | {"neftune_noise_alpha": 5.0})))

    assert min(differences(noisy, plain)) > 1e-3
    assert min(differences(noisy, weaker)) > 1e-3
    assert losses(child.run(train_spec(training=STEPS))) == plain, "the same process trains without it again"


@pytest.mark.parametrize("layout", ["padding_free", "packing"])
def test_rows_end_to_end_are_trained_with_noise(child: Child, layout: str) -> None:
    without, with_noise = (
        losses(child.run(train_spec(training=STEPS | {layout: True} | more)))
        for more in ({}, {"neftune_noise_alpha": 15.0})
    )

    assert min(differences(without, with_noise)) > 1e-3


def test_validations_see_no_noise(child: Child) -> None:
    """With weights that stay what they are."""
    still = STEPS | {"eval_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    without, with_noise = (
        child.run(train_spec(training=still | more, data={"limit": 40, "validation_split": 0.2}))
        for more in ({}, {"neftune_noise_alpha": 15.0})
    )

    assert with_noise.outcome["validation"]["losses"] == without.outcome["validation"]["losses"]
    assert len(with_noise.outcome["validation"]["losses"]) == 3
    assert min(differences(losses(with_noise), losses(without))) > 1e-3
