"""A trained adapter written as a model of its own: what is kept answers as the adapter does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from trainer_child import DEMO, Child, Done, train_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.trainer import gguf
from gpu_worker.trainer.compare import EIGHT_BITS, TOLERANCE, answer, closeness
from jobqueue.example import MultipleChoice

HERE = Path(__file__).parent
LINES = (DEMO / "train.jsonl").read_text().splitlines()
LEARNS = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
ROWS = [MultipleChoice(row["question"], row["options"], row["answer_idx"]) for row in map(json.loads, LINES[:4])]


def export_spec(**changes: Any) -> dict[str, Any]:
    """An export of an adapter of the demo model."""
    return {
        "kind": "export", "base_model": str(DEMO / "model"), "method": "lora", "adapter_job": "b.1",
        "data": {"source": str(DEMO / "train.jsonl")}, "lora": {}, "max_seq_length": 256, "export": {},
        "resources": {}, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(child: Child) -> Path:
    """An adapter that changes the demo model's answers a lot."""
    return child.run(train_spec(training=LEARNS)).folder / "adapter"


@pytest.fixture(scope="module")
def exported(child: Child, trained: Path) -> Done:
    """As a model and as GGUF."""
    export = {"formats": ["merged_16bit", "gguf"]}
    return child.run(export_spec(export=export), adapter=trained, gguf_converter=HERE / "gguf_converter.py")


@pytest.fixture
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)


def prompt(tokenizer: Any, row: MultipleChoice, answer: str = "") -> list[int]:
    text = tokenizer.apply_chat_template(row.conversation()[:-1], add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text + answer, add_special_tokens=False)["input_ids"])


def next_log_probs(model: Any, tokenizer: Any) -> torch.Tensor:
    """Of the word that names the answer: (rows, vocabulary)."""
    with torch.inference_mode():
        asked = [torch.tensor([prompt(tokenizer, row, "The correct answer is")]) for row in ROWS]
        return torch.stack([model(ids).logits[0, -1].log_softmax(-1) for ids in asked])


def test_the_merged_model_answers_as_the_adapter_and_not_as_its_base(exported: Done, trained: Path, base: Any) -> None:
    """unsloth#3508, unsloth#7792: the merged model was wrong while the adapter was right; answers are compared."""
    folder = exported.folder / "merged_16bit"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = next_log_probs(base, tokenizer)
    adapter = next_log_probs(PeftModel.from_pretrained(base, trained), tokenizer)
    merged = next_log_probs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)

    tops = adapter.argmax(1, keepdim=True)
    assert (merged - adapter).gather(1, tops).abs().max() < 0.05
    assert (before - adapter).gather(1, tops).abs().max() > 1
    said = exported.outcome["exports"][0]
    assert said["format"] == "merged_16bit"
    assert said["same_tokens"] == said["tokens"] > 20
    assert 3 * said["difference"] < said["tolerance"] < said["base_difference"] / 2


def test_a_merge_that_is_wrong_is_beyond_the_tolerance(trained: Path, base: Any) -> None:
    """unsloth#3508, unsloth#7792: the base model saved by mistake, the adapter at half its weight, in all layers or in
    some."""
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tuned = PeftModel.from_pretrained(base, trained)
    answers = answer(base, [prompt(tokenizer, row) for row in ROWS], [tokenizer.eos_token_id], tokenizer.pad_token_id)

    assert closeness(base, answers).difference < 1e-4
    with tuned.disable_adapter():
        assert closeness(base, answers).difference > TOLERANCE[torch.float32] + EIGHT_BITS
    layers = [module for module in tuned.modules() if isinstance(module, LoraLayer)]
    for wrong in (layers, layers[: len(layers) // 4]):
        for layer in wrong:
            layer.scaling["default"] /= 2
        assert closeness(base, answers).difference > TOLERANCE[torch.float32]
        for layer in wrong:
            layer.scaling["default"] *= 2


def test_a_base_whose_own_settings_have_no_effect_is_exported(child: Child, trained: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(DEMO / "model", tmp_path / "model"))
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False, "temperature": 0.9}))
    done = child.run(export_spec(base_model=str(base)), adapter=trained)
    assert "temperature" not in json.loads((done.folder / "merged_16bit" / "generation_config.json").read_text())
    assert done.outcome["exports"][0]["tokens"] > 20


def test_a_merged_folder_is_a_whole_model_in_16_bits_without_an_adapters_config(exported: Done) -> None:
    """unsloth#1061: the configs of a base model and of an adapter in one folder."""
    folder = exported.folder / "merged_16bit"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if "adapter" in name]
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_gguf_file_is_read_back_and_answers_as_the_adapter(exported: Done) -> None:
    """unsloth#3508, unsloth#7792: the GGUF file was wrong while the adapter was right."""
    file = exported.folder / "gguf" / "b.1-Q8_0.gguf"
    assert gguf.is_gguf(file)
    said = exported.outcome["exports"][1]
    assert (said["format"], said["same_tokens"]) == ("gguf q8_0", said["tokens"])
    assert exported.outcome["exports"][0]["difference"] < said["difference"] < said["tolerance"]
    assert sorted(path.name for path in exported.folder.iterdir()) == ["gguf", "merged_16bit"]


def test_a_gguf_file_with_weights_in_another_order_is_refused(child: Child, trained: Path, tmp_path: Path) -> None:
    """unsloth#3508, unsloth#7792: a converter that does not know a model's layout writes a file that loads and talks
    nonsense."""
    script = tmp_path / "wrong.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport gguf_converter as right\n")
    with script.open("a") as file:
        file.write("right.main(permutes=False)\n")
    failure = child.run(
        export_spec(export={"formats": ["gguf"], "quantization_method": "f16"}), adapter=trained, gguf_converter=script
    ).failure
    assert failure.reason == "wrong_export"
    assert failure.message.startswith("gguf f16 does not answer as the adapter does: log-probabilities differ by ")


def test_gguf_alone_leaves_no_other_model_behind_and_may_ask_the_users_own_prompts(child: Child, trained: Path) -> None:
    asked = {"formats": ["gguf"], "quantization_method": "bf16", "prompts": ["Find the vegetable."]}
    done = child.run(export_spec(export=asked, data=None), adapter=trained, gguf_converter=HERE / "gguf_converter.py")
    assert [made["format"] for made in done.outcome["exports"]] == ["gguf bf16"]
    assert [path.name for path in done.folder.rglob("*") if path.is_file()] == ["b.1-BF16.gguf"]


def test_a_worker_without_a_converter_says_so_before_it_loads_the_model(child: Child, trained: Path) -> None:
    done = child.run(export_spec(export={"formats": ["gguf"]}), adapter=trained)
    assert done.failure.reason == "bad_spec"
    assert "name llama.cpp's convert_hf_to_gguf.py there" in done.failure.message
    assert done.progress == []
