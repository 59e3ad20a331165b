"""Every way to train: what is saved is what was trained, as an evaluation in the same trainer finds it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from trainer_child import DEMO, Child, train_spec

from jobqueue import rows
from jobqueue.data_spec import DataSpec

SPLIT = {"limit": 40, "validation_split": 0.25}
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
WAYS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora"},
    "full": {"method": "full", "training": TRAINING | {"learning_rate": 1e-3}},
    "use_rslora": {"lora": {"use_rslora": True, "r": 8}},
    "lora_dropout": {"lora": {"lora_dropout": 0.2}},
    "all-linear": {"lora": {"target_modules": "all-linear"}},
    "two modules": {"lora": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 32}},
    "bias": {"lora": {"bias": "all"}},
}


@pytest.fixture(scope="module")
def kept_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that SPLIT keeps back, as conversations."""
    spec = DataSpec(**train_spec(data=SPLIT)["data"])
    _, kept = rows.split(spec, [example for _, example in rows.load(spec).examples])
    assert len(kept) >= 4
    file = tmp_path_factory.mktemp("rows") / "kept.jsonl"
    file.write_text("".join(json.dumps({"messages": example.conversation}) + "\n" for example in kept))
    return file


def loss_of(child: Child, spec: dict[str, Any], adapter: Path | None, questions: Path) -> float:
    """On those rows, by an evaluation of the adapter or of the base model."""
    asked = {
        "kind": "evaluate", "base_model": spec["base_model"], "method": spec["method"], "max_seq_length": 256,
        "adapter_job": "b.1" if adapter else None, "load_in_4bit": spec["method"] == "qlora", "resources": {},
        "evaluation": {"source": str(questions), "metrics": ["perplexity"]},
    }  # fmt: skip
    return float(child.run(asked, adapter=adapter).outcome["perplexity"]["loss"])


@pytest.mark.parametrize("way", WAYS)
def test_an_evaluation_finds_the_loss_that_training_ended_with(child: Child, kept_back: Path, way: str) -> None:
    spec = train_spec(**{"training": TRAINING, "data": SPLIT} | WAYS[way])
    trained = child.run(spec)
    (_, at_the_end) = trained.outcome["validation"]["losses"][-1]

    found = loss_of(child, spec, trained.folder / "adapter", kept_back)

    rounding = 5e-3 if way == "qlora" else 2e-4  # a 4-bit layer is not multiplied in the same order
    assert math.isclose(found, at_the_end, rel_tol=rounding), (found, at_the_end)
    assert not math.isclose(found, loss_of(child, spec, None, kept_back), rel_tol=0.01), "and it has changed"


def test_a_validation_takes_the_mean_over_its_tokens_whatever_its_batches_are(child: Child, tmp_path: Path) -> None:
    """transformers takes the mean over rows of their batch's mean, which depends on what is in a batch with what."""
    file, kept_file = tmp_path / "rows.jsonl", tmp_path / "kept.jsonl"
    answers = ["yes" if number % 3 else "a long answer " * 9 for number in range(40)]
    uneven = [{"prompt": f"What is {number}?", "completion": answer} for number, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in uneven))
    data = {"source": str(file), "validation_split": 0.25}
    _, kept = rows.split(DataSpec(**data), [example for _, example in rows.load(DataSpec(**data)).examples])
    kept_file.write_text("".join(json.dumps({"messages": example.conversation}) + "\n" for example in kept))
    expected = loss_of(child, train_spec(), None, kept_file)
    for batch in (1, 4, 16):
        training = {"max_steps": 1, "learning_rate": 1e-12, "per_device_train_batch_size": batch}
        validation = child.run(train_spec(data=data, training=training)).outcome["validation"]
        assert (validation["rows"], validation["losses"]) == (len(kept), [[1, pytest.approx(expected, rel=1e-5)]])


@pytest.mark.parametrize("mode", [True, "unsloth"])
def test_gradient_checkpointing_changes_no_loss(child: Child, mode: bool | str) -> None:
    spec = train_spec(training={"logging_steps": 1}, lora={"use_gradient_checkpointing": mode})
    without = train_spec(training={"logging_steps": 1}, lora={"use_gradient_checkpointing": False})
    losses, plain = (child.run(s).outcome["losses"] for s in (spec, without))
    assert [loss for _, loss, _ in losses] == pytest.approx([loss for _, loss, _ in plain], rel=1e-5)


def test_loftq_is_refused_where_it_cannot_be_computed(child: Child) -> None:
    failure = child.run(train_spec(lora={"loftq_config": {"loftq_bits": 4}})).failure
    assert (failure.reason, failure.message) == (
        "bad_spec", "lora.loftq_config needs a GPU: PEFT computes it there; leave it out on this worker",
    )  # fmt: skip


def test_a_whole_model_keeps_the_tokens_of_its_own_tokenizer(child: Child, tmp_path: Path) -> None:
    """One that names no pad token in its config got that of whatever tokenizer Unsloth was given."""
    base = Path(shutil.copytree(DEMO / "model", tmp_path / "model"))
    config = json.loads((base / "config.json").read_text())
    pad = config.pop("pad_token_id")
    (base / "config.json").write_text(json.dumps(config))
    trained = child.run(train_spec(base_model=str(base), method="full", training=TRAINING | {"max_steps": 1}))
    for name in ("config.json", "generation_config.json"):
        saved = json.loads((trained.folder / "adapter" / name).read_text())
        assert saved["pad_token_id"] == pad


def test_a_whole_model_is_saved_though_its_own_settings_have_no_effect(child: Child, tmp_path: Path) -> None:
    """As Llama 2 was published: transformers reads a temperature where nothing is drawn, and refuses to write it."""
    base = Path(shutil.copytree(DEMO / "model", tmp_path / "model"))
    settings = json.loads((base / "generation_config.json").read_text())
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "pad_token_id": -1, "repetition_penalty": 1.1}
    (base / "generation_config.json").write_text(json.dumps(settings | odd))
    spec = train_spec(base_model=str(base), method="full", training=TRAINING | {"max_steps": 2, "save_steps": 1})
    trained = child.run(spec)
    assert [folder.name for folder in trained.checkpoints] == ["checkpoint-1"]
    saved = json.loads((trained.folder / "adapter" / "generation_config.json").read_text())
    assert saved["repetition_penalty"] == 1.1
    assert not saved.keys() & {"temperature", "top_p"}
