"""A trainer that has no job yet trains something tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from bare_main import BareMain

from gpu_worker.protocol import Ready, Result
from gpu_worker.trainer import child

TWICE = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
from gpu_worker.trainer import child
child._import()
from gpu_worker.trainer import warm_up
steps = []
usual = warm_up.train

def train(*arguments):
    outcome = usual(*arguments)
    steps.append(outcome["training"]["steps"])

warm_up.train = train
print("begin", flush=True)
print([warm_up.warm_up()])

def broken(*_):
    print("not to be seen")
    raise RuntimeError("no room\\nat all")

warm_up.train = broken
print([warm_up.warm_up()])
print("end", steps)
"""


PAD = """
from gpu_worker.trainer import model
from gpu_worker.trainer.byte_tokenizer import byte_tokenizer
from unsloth_zoo.pad_token import fix_pad_token
tokenizer = byte_tokenizer()
print("own pad token:", fix_pad_token(tokenizer)["reason"])
tokenizer.pad_token = tokenizer.eos_token
print("the one that ends texts:", fix_pad_token(tokenizer)["reason"])
"""


def lines_of(script: str) -> list[str]:
    """What it prints."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, env=environment, timeout=300
    )
    return ended.stdout.splitlines()


def test_it_trains_and_tells_what_went_wrong() -> None:
    lines = lines_of(TWICE)
    said, first, second, end = lines[lines.index("begin") + 1 :]
    assert said.startswith("the trainer has warmed up in ")
    assert first == "['']"
    assert second == "['warming up failed: RuntimeError: no room at all']"
    assert end == "end [2]"


def test_its_tokenizer_has_a_pad_token_that_unsloth_takes() -> None:
    """On a GPU Unsloth refused one that ends texts, too: no trainer had ever warmed up there."""
    lines = lines_of(PAD)
    assert "own pad token: None" in lines
    assert "the one that ends texts: equals_eos" in lines


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("has_a_job", [True, False])
def test_only_a_spare_on_a_gpu_does_it(
    monkeypatch: pytest.MonkeyPatch, bare_main: BareMain, on_gpu: bool, has_a_job: bool
) -> None:
    reading, writing = os.pipe()
    warmed: list[int] = []

    def warm_up() -> str:
        warmed.append(writing)
        os.close(writing)
        return "it is cold"

    monkeypatch.setattr(child, "_run", lambda *_: Result({}))
    if has_a_job:
        os.write(writing, json.dumps({"job_id": "one", "spec": {}, "output": ""}).encode() + b"\n")
    expected = on_gpu and not has_a_job
    if not expected:
        os.close(writing)
    with os.fdopen(reading, "rb") as requests:
        model = SimpleNamespace(free=lambda: None, ON_GPU=on_gpu)
        events = bare_main(requests, model=model, warm_up=SimpleNamespace(warm_up=warm_up))
    assert len(warmed) == expected
    assert events[0] == Ready({}, "it is cold" if expected else "")
    assert [type(event) for event in events[1:]] == [Result] * has_a_job
