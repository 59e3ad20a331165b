"""Memory classes, and the estimate of a job's peak; pure."""

from __future__ import annotations

from typing import Any

import pytest

from jobqueue.data_spec import DataSpec, EwcSpec
from jobqueue.export_spec import ExportOptions
from jobqueue.job_spec import EvaluateSpec, ExportSpec, TrainSpec
from jobqueue.memory import CLASSES, CONTEXT, GIB, Shape, classes_for, estimate, memory_class
from jobqueue.spec import EvaluationSpec, LoraSpec, ResourcesSpec, TrainingSpec

LLAMA_1B: dict[str, Any] = {
    "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


def train(method: str = "qlora", memory: str | None = None, lora: LoraSpec | None = None, **training: Any) -> TrainSpec:
    return TrainSpec(
        base_model="m",
        method=method,  # type: ignore[arg-type]
        data=DataSpec(source="s"),
        lora=lora or LoraSpec(),
        training=TrainingSpec(**training),
        resources=ResourcesSpec(memory=memory),  # type: ignore[arg-type]
    )


def evaluate(**changes: Any) -> EvaluateSpec:
    fields: dict[str, Any] = {
        "base_model": "m", "method": "qlora", "adapter_job": None, "load_in_4bit": True, "max_seq_length": 2048,
        "evaluation": EvaluationSpec(source="s"), "resources": ResourcesSpec(),
    }  # fmt: skip
    return EvaluateSpec(**{**fields, **changes})


# -- classes


@pytest.mark.parametrize("size", CLASSES)
def test_a_card_serves_its_own_class_and_all_smaller_ones(size: int) -> None:
    names = [f"gpu{each}" for each in CLASSES]

    assert classes_for(int(size * 0.91 * GIB)) == names[: CLASSES.index(size) + 1]
    assert classes_for(400 * GIB) == [*names, "gpu-large"]


def test_a_job_is_in_the_smallest_class_whose_cards_hold_it() -> None:
    assert memory_class(1) == "gpu8"
    assert memory_class(int(8 * 0.92 * GIB)) == "gpu8"
    assert memory_class(int(8 * 0.92 * GIB) + 1) == "gpu16"
    assert memory_class(8 * GIB) == "gpu16", "a card that is sold with 8 GiB has less"
    assert memory_class(1000 * GIB) == "gpu-large"


@pytest.mark.parametrize("gib", [0.5, 3, 7.3, 7.4, 14.7, 14.8, 40, 75, 130, 300])
def test_every_worker_that_could_hold_a_job_listens_to_its_class(gib: float) -> None:
    need = int(gib * GIB)

    for usable in (need, need + GIB, 4 * need):
        assert memory_class(need) in classes_for(usable)


def test_a_worker_without_memory_listens_to_nothing() -> None:
    assert classes_for(0) == []


# -- the estimate


def test_what_the_user_says_goes_before_every_estimate() -> None:
    assert estimate(LLAMA_1B, train(memory="12GiB")) == 12 * GIB
    assert estimate({}, train(memory="12GiB")) == 12 * GIB
    assert estimate({}, evaluate(resources=ResourcesSpec(memory=3))) == 3 * GIB  # type: ignore[arg-type]


def test_the_article_s_job_is_a_few_gib_and_fits_an_8_gib_card() -> None:
    need = estimate(LLAMA_1B, train())

    assert 2 * GIB < need < 7 * GIB
    assert memory_class(need) == "gpu8"


def test_llama_1b_has_the_weights_that_it_has() -> None:
    shape = Shape.from_config(LLAMA_1B)

    assert shape.linear_weights + shape.embedding_weights == pytest.approx(1.2358e9, rel=0.001)
    assert shape.lora_weights(LoraSpec()) == 11_272_192, "as Unsloth prints for r=16 on seven modules"


def test_more_of_anything_needs_more() -> None:
    least = estimate(LLAMA_1B, train())

    assert estimate(LLAMA_1B, train(max_seq_length=4096)) > least
    assert estimate(LLAMA_1B, train(per_device_train_batch_size=4)) > least
    assert estimate(LLAMA_1B, train(optim="adamw_torch")) > least
    assert estimate(LLAMA_1B, train(lora=LoraSpec(r=64))) > least
    assert estimate(LLAMA_1B, train(lora=LoraSpec(use_gradient_checkpointing=False))) > least
    assert estimate(LLAMA_1B, train("lora")) > least
    held = train().model_copy(update={"ewc": EwcSpec(ewc_lambda=1.0)})
    assert estimate(LLAMA_1B, held) - least > 8 * 11_272_192, "two more numbers of 32 bits for each weight"
    assert estimate(LLAMA_1B, train("full")) > estimate(LLAMA_1B, train("lora"))
    half = train("full").model_copy(update={"dtype": "float16"})
    assert estimate(LLAMA_1B, half) - estimate(LLAMA_1B, train("full")) > 6 * 1.2358e9, "weights, gradients, and a copy"
    assert estimate(LLAMA_1B, train().model_copy(update={"dtype": "float16"})) == least
    assert estimate(LLAMA_1B, evaluate(load_in_4bit=False)) > estimate(LLAMA_1B, evaluate()) > CONTEXT


def test_an_export_has_the_model_in_16_bits_once_whatever_it_was_trained_in() -> None:
    def export(method: str, **lora: Any) -> int:
        spec = ExportSpec.of(train(method, lora=LoraSpec(**lora)), "b.1", ExportOptions())
        return estimate(LLAMA_1B, spec)

    weights = Shape.from_config(LLAMA_1B).weight_bytes(in_4bit=False)
    assert weights + CONTEXT < export("full") < export("lora") == export("qlora") < 1.5 * weights + CONTEXT
    assert export("qlora", r=64) > export("qlora")


def test_accumulation_costs_no_memory() -> None:
    assert estimate(LLAMA_1B, train(gradient_accumulation_steps=64)) == estimate(LLAMA_1B, train())


def test_a_model_with_pictures_is_estimated_by_its_text_part() -> None:
    assert estimate({"vision_config": {}, "text_config": LLAMA_1B}, train()) == estimate(LLAMA_1B, train())


def test_a_config_without_heads_of_its_own_has_the_usual_ones() -> None:
    plain = {key: value for key, value in LLAMA_1B.items() if key not in ("num_key_value_heads", "head_dim")}

    assert Shape.from_config(plain) == Shape.from_config({**LLAMA_1B, "num_key_value_heads": 32, "head_dim": 64})


def test_a_config_of_something_else_has_no_estimate() -> None:
    with pytest.raises(KeyError):
        estimate({"model_type": "diffusion"}, train())
