"""What a trainer begins with: its imports, and the environment of its jobs."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bare_main import BareMain
from bitsandbytes.functional import GlobalPageManager

from gpu_worker.protocol import Failed, Ready, Request, Result
from gpu_worker.trainer import child, usage

FAULT = "CUDA error: device-side assert triggered"
TWO_JOBS = [json.dumps({"job_id": name, "spec": {}, "output": ""}).encode() for name in ("first", "second")]


def test_a_job_finds_the_environment_that_the_first_one_found(
    monkeypatch: pytest.MonkeyPatch, bare_main: BareMain
) -> None:
    """On a GPU a QLoRA training behind a full one got no adapter, as Unsloth still took all weights to be trained."""
    monkeypatch.setenv("KEPT", "as it was")
    monkeypatch.delenv("UNSLOTH_ENABLE_FULL_FINETUNING", raising=False)
    found: list[dict[str, str]] = []

    def run(_request: Request, _emit: child.Emit) -> Result:
        found.append(dict(os.environ))
        os.environ["UNSLOTH_ENABLE_FULL_FINETUNING"] = "1"
        os.environ["KEPT"] = "otherwise"
        return Result({})

    monkeypatch.setattr(child, "_run", run)
    events = bare_main(TWO_JOBS)

    first, second = found
    assert second == first
    assert first["KEPT"] == "as it was"
    assert [type(event) for event in events] == [Ready, Result, Result]


def test_a_fault_on_the_gpu_is_reported_though_its_memory_cannot_be_given_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bare_main: BareMain
) -> None:
    """The trainer ended without a word, and its last line was torch's hint for those who debug kernels."""

    def broken(*_: object) -> Any:
        raise RuntimeError(f"{FAULT}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.")

    monkeypatch.setattr(child, "_outcome", broken)
    events = bare_main(TWO_JOBS, model=SimpleNamespace(free=broken, ON_GPU=False))

    assert events == [Ready(), Failed("internal", f"RuntimeError: {FAULT}")], "and it takes no other job"
    assert f"this trainer ends, its GPU does not answer any more: {FAULT}" in caplog.messages


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


def test_threads_that_wait_for_the_gpu_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to CUDA's driver, by a library of its name, before anything makes a context."""
    source, driver = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text("""
int flags = -1;
int cuInit(unsigned int flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned int wanted) { flags = wanted; return device == 7 ? 0 : 101; }
""")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", driver, source], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / name)))

    child._sleep_on_gpu()

    assert ctypes.c_int.in_dll(load(str(driver)), "flags").value == 4, "CU_CTX_SCHED_BLOCKING_SYNC"
