"""What a job needs in memory: the GPU's, or this process's where there is no GPU. Bytes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from jobqueue.memory import CONTEXT

PACKAGES = (
    "loraq", "unsloth", "unsloth_zoo", "torch", "triton", "transformers", "tokenizers", "trl", "peft", "datasets",
    "bitsandbytes", "accelerate", "xformers", "flash_attn",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
            pynvml.nvmlShutdown()
    return found


def reset_peak() -> None:
    """From here on peaks are counted anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # 5: the peak of the resident size, see proc(5)
        Path("/proc/self/clear_refs").write_text("5")


def total() -> int:
    """Of this GPU, or of the machine where there is no GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total)


def reserved() -> int:
    """What the allocator holds now (on the CPU: the resident size)."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)


def hold_to(budget_bytes: int | None) -> int | None:
    """From now on PyTorch takes no more than this, the CUDA context included; None: as much as there is."""
    if torch.cuda.is_available():
        share = 1.0 if budget_bytes is None else (budget_bytes - CONTEXT) / total()
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))
    return budget_bytes


def allocated() -> int:
    """GPU memory in tensors now; 0 without a GPU, where nothing can be said.

    With the pages of paged optimizers, which bitsandbytes never gives back and PyTorch does not know of.
    """
    if not torch.cuda.is_available():
        return 0
    from bitsandbytes.functional import GlobalPageManager  # not above: Unsloth is imported before it

    pages: list[torch.Tensor] = GlobalPageManager.get_instance().paged_tensors
    return int(torch.cuda.memory_allocated()) + sum(page.nbytes for page in pages)


def _peaks() -> tuple[int, int]:
    """(reserved, allocated) at most since `reset_peak`."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved()), int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), reserved())
    return peak, peak


def memory(reserved_at_start: int) -> dict[str, Any]:
    """The memory part of an outcome; `reserved_at_start`: after loading, before the work."""
    on_gpu = torch.cuda.is_available()
    peak_reserved, peak_allocated = _peaks()
    for_training = max(0, peak_reserved - reserved_at_start)
    return {
        "kind": "gpu" if on_gpu else "ram",
        "gpu": torch.cuda.get_device_name(0) if on_gpu else "cpu",
        "total_bytes": total(),
        "reserved_at_start_bytes": reserved_at_start,
        "peak_reserved_bytes": peak_reserved,
        "peak_for_training_bytes": for_training,
        "peak_allocated_bytes": peak_allocated,
        "peak_percent": round(100 * peak_reserved / total(), 3),
        "peak_for_training_percent": round(100 * for_training / total(), 3),
    }
