"""A training that goes on from the weights of an earlier adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_child import DEMO, Child, Done, train_spec

STEPS = {"max_steps": 12, "logging_steps": 1}
NAME = "storage:batches/b/b.1/1-x/adapter"  # as a worker's request has it


@pytest.fixture(scope="module")
def earlier(child: Child) -> Done:
    return child.run(train_spec(training=STEPS))


def go_on(child: Child, adapter: Path, **changes: Any) -> Done:
    return child.run(train_spec(from_adapter=NAME, **changes), adapter=adapter)


def test_it_begins_with_the_weights_and_so_the_loss_of_the_earlier_one(child: Child, earlier: Done) -> None:
    outcome = go_on(child, earlier.folder / "adapter", training=STEPS).outcome
    first, fresh, last = outcome["losses"][0][1], earlier.outcome["losses"][0][1], earlier.outcome["losses"][-1][1]
    assert abs(first - last) < abs(first - fresh) / 2, (first, fresh, last)
    assert outcome["training"]["from_adapter"] == NAME

    still = go_on(child, earlier.folder / "adapter", training={"max_steps": 1, "learning_rate": 1e-12})
    weights, before = (load_file(d.folder / "adapter" / "adapter_model.safetensors") for d in (still, earlier))
    assert weights.keys() == before.keys()
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in before.items())
    assert any(tensor.abs().max() > 0 for name, tensor in before.items() if "lora_B" in name)


def test_an_adapter_that_does_not_fit_is_refused_with_what_to_set(child: Child, earlier: Done, tmp_path: Path) -> None:
    adapter = earlier.folder / "adapter"
    failure = go_on(child, adapter, lora={"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}).failure
    assert failure.reason == "bad_spec"
    assert failure.message == (
        f"from_adapter {NAME} does not fit; as it was trained, set under lora: r: 16, lora_alpha: 16, "
        "target_modules: [down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj]"
    )
    assert go_on(child, tmp_path).failure.reason == "bad_spec"

    shutil.copytree(DEMO / "model", tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    weights = load_file(tmp_path / "wide" / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name in ("gate_proj", "up_proj", "down_proj"):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            weights[key] = torch.cat([weights[key]] * 2, dim=1 if name == "down_proj" else 0)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    config["intermediate_size"] *= 2
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    other = go_on(child, adapter, base_model=str(tmp_path / "wide")).failure
    assert f"is of another base model ({DEMO / 'model'})" in other.message


def test_an_attempt_that_goes_on_does_so_from_its_checkpoint(child: Child, earlier: Done) -> None:
    saving = STEPS | {"save_steps": 6}
    whole = go_on(child, earlier.folder / "adapter", training=saving)
    resumed = child.run(
        train_spec(from_adapter=NAME, training=saving), adapter=earlier.folder / "adapter", resume=whole.checkpoints[0]
    )
    assert resumed.outcome["losses"][-1][1] == pytest.approx(whole.outcome["losses"][-1][1], abs=1e-3)


def test_an_adapter_that_belongs_to_a_changed_base_model_is_refused(
    child: Child, earlier: Done, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(earlier.folder / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    failure = go_on(child, adapter).failure
    assert failure.reason == "bad_spec"
    assert failure.message == f"from_adapter {NAME} began as pissa, which changes the base model; take a plain one"
