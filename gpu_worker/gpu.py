"""What this machine offers: its GPUs by NVML, or its main memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from jobqueue.errors import MachineError

HEADROOM = 0.02  # of a card's memory: what the driver takes between two looks
RAM_SHARE = 0.9


@dataclass(frozen=True)
class Device:
    """What a worker serves."""

    kind: str  # gpu, cpu or control
    name: str  # as people know it
    uuid: str = ""
    index: int = 0

    @property
    def label(self) -> str:
        """The worker's name on its host."""
        return f"gpu{self.index}" if self.kind == "gpu" else self.kind


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, open while in use. Raises MachineError where there is no driver."""
    try:
        import pynvml
    except ImportError as error:
        raise MachineError("nvidia-ml-py is not installed", "Install it: pip install 'loraq[worker]'") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise MachineError(
            f"no NVIDIA GPU can be used here: {error}",
            "Install the NVIDIA driver, or work on the CPU: loraq worker --cpu",
        ) from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def gpus() -> list[Device]:
    """The GPUs of this machine, in NVML's order. Raises MachineError where there is none."""
    with _nvml() as nvml:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            found.append(
                Device(
                    kind="gpu",
                    name=_text(nvml.nvmlDeviceGetName(handle)),
                    uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                    index=index,
                )
            )
    if not found:
        raise MachineError("there is no NVIDIA GPU here", "Work on the CPU instead: loraq worker --cpu")
    return found


def choose(wanted: list[str]) -> list[Device]:
    """The GPUs of these indices or UUIDs (or beginnings of one); all of them for an empty list.

    Raises MachineError for one that is not here.
    """
    devices = gpus()
    chosen = []
    for want in wanted:  # an index first: a UUID may begin with the same digit
        fitting = [d for d in devices if want == str(d.index)] or [
            d for d in devices if d.uuid.startswith(want) or d.uuid[4:].startswith(want)
        ]
        if len(fitting) != 1:
            known = ", ".join(f"{d.index} ({d.uuid})" for d in devices)
            raise MachineError(f"no GPU is called {want!r} here", f"There are: {known}")
        chosen.append(fitting[0])
    return chosen or devices


def free_bytes(device: Device) -> int:
    """What a job may take now, as the machine says: GPU memory that nobody holds, or a share of the main memory."""
    if device.kind == "gpu":
        with _nvml() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(device.uuid)
            info = nvml.nvmlDeviceGetMemoryInfo(handle)
            return max(0, int(info.free - HEADROOM * info.total))
    return int(psutil.virtual_memory().total * RAM_SHARE)
