"""Gradient checkpointing of the longer micro-batches alone, in a model as Unsloth trains it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from trainer_child import DEADLINE_S, DEMO, ROOT

SPARED = 20
LENGTHS = [12, 20, 21, 40, 12]

TRAINS = f"""
import json
from functools import partial
from gpu_worker.trainer.child import _environment
_environment()
from gpu_worker.trainer import model as models
from gpu_worker.trainer.recompute import recompute_above
import torch
from jobqueue.spec import LoraSpec

base = models.load({str(DEMO / "model")!r}, "lora", 256, load_in_4bit=False)
model = models.add_lora(base.model, LoraSpec(use_gradient_checkpointing="unsloth"), 256)
models.for_training(model)
for name, parameter in model.named_parameters():
    if "lora_B" in name:  # else the gradients of lora_A are nothing
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
recomputed = []
layers = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
layers = [layer for layer in layers if hasattr(layer, "self_attn")]
for layer in layers:
    def counted(*arguments, own=layer._gradient_checkpointing_func, **more):
        recomputed.append(1)
        return own(*arguments, **more)
    layer._gradient_checkpointing_func = counted

def training_step(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return float(loss.detach()), {{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

def trained(spared):
    step = partial(recompute_above(spared), training_step)
    found = []
    for length in {LENGTHS}:
        recomputed.clear()
        ids = torch.arange(10, 10 + length)[None]
        found.append((len(recomputed), *step(model, {{"input_ids": ids}}), len(recomputed)))
    return found

plain, found = trained(0), trained({SPARED})
same = all(
    loss == other_loss and gradients.keys() == other.keys()
    and all(torch.allclose(gradients[n], other[n], rtol=1e-4, atol=1e-7) for n in other)
    for (_, loss, gradients, _), (_, other_loss, other, _) in zip(found, plain)
)
some = sum(float(g.abs().sum()) > 0 for g in plain[0][2].values())
print(json.dumps({{"layers": len(layers), "plain": [p[3] for p in plain], "found": [f[3] for f in found],
                  "same": same, "gradients": some}}))
"""


def test_only_micro_batches_that_need_it_are_recomputed_and_the_gradients_are_the_same(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("recompute")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LORAQ_", "UNSLOTH_"))}
    environment |= {"LORAQ_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRAINS],
        env={**environment, "HF_HUB_OFFLINE": "1"}, cwd=folder, timeout=DEADLINE_S, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    layers = told["layers"]
    assert layers > 0
    assert told["plain"] == [layers] * len(LENGTHS)
    assert told["found"] == [layers if length > SPARED else 0 for length in LENGTHS]
    assert told["same"], "loss and gradients"
    assert told["gradients"] > layers
