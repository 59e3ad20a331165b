"""What a trainer begins with: its imports, and the environment of its jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import GlobalPageManager

import gpu_worker.trainer
from gpu_worker.protocol import Event, Ready, Request, Result
from gpu_worker.trainer import child, usage


def test_a_job_finds_the_environment_that_the_first_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a QLoRA training behind a full one got no adapter, as Unsloth still took all weights to be trained."""
    idle: Any = lambda *_: None  # noqa: E731
    free_of_all = SimpleNamespace(allocated=lambda: 0, total=lambda: 1, versions=dict, hold_to=idle)
    for name, module in (
        ("usage", free_of_all),
        ("checkpoint", SimpleNamespace(listen=idle)),
        ("model", SimpleNamespace(free=idle, ON_GPU=False)),
    ):
        monkeypatch.setattr(gpu_worker.trainer, name, module, raising=False)
    monkeypatch.setattr(child, "_import", idle)
    monkeypatch.setattr(child.signal, "signal", idle)
    monkeypatch.setattr(child.logging, "basicConfig", lambda **_: None)
    monkeypatch.setenv("KEPT", "as it was")
    monkeypatch.delenv("UNSLOTH_ENABLE_FULL_FINETUNING", raising=False)
    found: list[dict[str, str]] = []
    events: list[Event] = []

    def run(_request: Request, _emit: child.Emit) -> Result:
        found.append(dict(os.environ))
        os.environ["UNSLOTH_ENABLE_FULL_FINETUNING"] = "1"
        os.environ["KEPT"] = "otherwise"
        return Result({})

    def requests() -> Iterator[bytes]:
        for name in ("first", "second"):
            yield json.dumps({"job_id": name, "spec": {}, "output": ""}).encode()

    monkeypatch.setattr(child, "_run", run)
    monkeypatch.setattr(child, "_channels", lambda: (requests(), events.append))
    before = dict(os.environ)
    try:
        child.main()
    finally:
        os.environ.clear()
        os.environ.update(before)

    first, second = found
    assert second == first
    assert first["KEPT"] == "as it was"
    assert [type(event) for event in events] == [Ready, Result, Result]


def test_pages_that_are_never_given_back_are_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that had done one paged training after the other would have filled the card, and not known it."""
    pages = [torch.empty(3, dtype=torch.float32), torch.empty(5, dtype=torch.uint8)]
    monkeypatch.setattr(GlobalPageManager.get_instance(), "paged_tensors", pages)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usage.allocated() == 0  # without a GPU nothing is paged
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    assert usage.allocated() == 1000 + 12 + 5


IMPORTS = """
import gc, os, sys

class Order:
    names = []
    def find_spec(self, name, *_):
        if name in ("unsloth", "torch", "transformers", "peft", "trl"):
            self.names.append(name)

sys.meta_path.insert(0, Order())
from gpu_worker.trainer import child
child.main()
print("first", Order.names[0], "frozen", gc.get_freeze_count(), "collects", gc.isenabled())
"""


def test_unsloth_is_imported_first_and_no_import_is_looked_at_for_garbage() -> None:
    """Behind torch it had no say in how torch allocates."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    environment = {**os.environ, child.EVENTS_FD: str(descriptor), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTS], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True,
        env=environment, pass_fds=[descriptor], timeout=300,
    )  # fmt: skip
    os.close(descriptor)
    words = ended.stdout.splitlines()[-1].split()
    assert words[:2] == ["first", "unsloth"]
    assert int(words[3]) > 100_000
    assert words[5] == "True"
