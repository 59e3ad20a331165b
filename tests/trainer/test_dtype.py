"""What is computed in: on a CPU 32 bits, and on a card what it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from trainer_child import DEADLINE_S, DEMO, Child, ask_spec, evaluate_spec, train_spec

ON_CARDS = f"""
import json
from gpu_worker.protocol import Request
from gpu_worker.trainer import child
child._environment()
from gpu_worker.trainer import model as models
import torch
from gpu_worker.trainer import config
from gpu_worker.trainer.failures import JobFailure
from jobqueue.job_spec import TrainSpec

models.ON_GPU = True
torch.cuda.get_device_name = lambda: "Tesla T4"
config.SFTConfig = lambda **options: options

def found(dtype):
    spec = TrainSpec.model_validate_json(json.dumps({{**{train_spec()!r}, "dtype": dtype}}))
    request = Request("job", spec.model_dump(mode="json"), "out")
    try:
        made = config.config_of(spec, request, 0, [])
        return str(models.dtype(dtype)), made["bf16"], made["fp16"], made["use_cpu"]
    except JobFailure:
        try:
            child._outcome(request, None)  # before the data is read, and the model loaded
        except JobFailure as failure:
            return failure.reason, str(failure)

for has_bf16 in (True, False):
    torch.cuda.is_bf16_supported = lambda *_, **__: has_bf16
    for dtype in (None, "bfloat16", "float16"):
        print("found:", json.dumps(found(dtype)))
"""


@pytest.fixture(scope="module")
def on_cards(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """For None, bfloat16 and float16: what a card that has bf16 computes in and how TRL is told, then one without."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "LORAQ_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(
        [sys.executable, "-c", ON_CARDS], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    lines = [line.removeprefix("found: ") for line in done.stdout.splitlines() if line.startswith("found: ")]
    assert len(lines) == 6, done.stderr[-3000:]
    return [json.loads(line) for line in lines]


def test_a_card_computes_in_what_is_asked_for_and_trl_is_told_the_same(on_cards: list[Any]) -> None:
    bf16, fp16 = ["torch.bfloat16", True, False, False], ["torch.float16", False, True, False]
    assert on_cards[:3] == [bf16, bf16, fp16]
    assert [on_cards[3], on_cards[5]] == [fp16, fp16], "a card without bf16"


def test_bfloat16_is_refused_where_the_card_has_none_before_anything_is_loaded(on_cards: list[Any]) -> None:
    reason, message = on_cards[4]
    assert reason == "bad_spec"
    assert message == "dtype: Tesla T4 does not compute in bfloat16; set dtype: float16, or leave it out"


def test_a_cpu_computes_in_32_bits_whatever_is_asked_for_and_says_so_once(child: Child) -> None:
    said = "dtype: a CPU computes in 32 bits, not in float16"
    before = child.log.read_text().count(said)
    plain, half = (child.run(train_spec(dtype=dtype)) for dtype in (None, "float16"))

    assert half.outcome["losses"] == plain.outcome["losses"]
    assert child.log.read_text().count(said) == before + 1, "by the job that asks for it"
    adapter = half.folder / "adapter"
    evaluated = [child.run(evaluate_spec(adapter_job="b.1", dtype=d), adapter=adapter) for d in (None, "float16")]
    assert evaluated[0].outcome["likelihood"] == evaluated[1].outcome["likelihood"]
    child.run(ask_spec("Which one?", dtype="float16"), adapter=adapter)
    assert child.log.read_text().count(said) == before + 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_export_is_asked_in_the_dtype_of_its_training(child: Child, method: str) -> None:
    spec = train_spec(method=method, dtype="float16")
    trained = child.run(spec)
    export = {
        "kind": "export", "base_model": spec["base_model"], "method": method, "dtype": "float16", "resources": {},
        "adapter_job": "b.1", "data": spec["data"], "lora": {}, "max_seq_length": 256,
        "export": {"formats": ["merged_16bit"]},
    }  # fmt: skip
    made = child.run(export, adapter=trained.folder / "adapter")
    assert [one["format"] for one in made.outcome["exports"]] == ["merged_16bit"]
    stored = json.loads((made.folder / "merged_16bit" / "config.json").read_text())["dtype"]
    # LoRA's base model has a dtype of its own; all weights were trained in 32 bits
    assert (
        stored == {"lora": json.loads((DEMO / "model" / "config.json").read_text())["dtype"], "full": "float16"}[method]
    )
