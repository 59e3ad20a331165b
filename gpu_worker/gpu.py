"""What this machine offers: its GPUs by NVML, or its main memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import psutil

from jobqueue.errors import MachineError

HEADROOM = 0.02  # of a card's memory: what the driver takes between two looks
RAM_SHARE = 0.9
LOOKS = 3  # at the memory, until no process came or went meanwhile
RECOVERY = {  # NVML_GPU_RECOVERY_ACTION_*
    0: "",
    1: "a reset",
    2: "a reboot",
    3: "its peer-to-peer traffic drained",
    4: "to be drained and reset",
    5: "its IMEX domain recovered",
    6: "a bus reset",
    7: "a reboot",
}
Answer = TypeVar("Answer")


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


@dataclass(frozen=True)
class Load:
    """How busy a device is, for people to see; 0 or None for what it does not tell."""

    total_bytes: int = 0
    used_bytes: int = 0
    utilization: int | None = None  # percent of the last moments in which it computed
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None


@dataclass(frozen=True)
class Reading:
    """One look at a card."""

    total_bytes: int
    free_bytes: int
    held: Mapping[int, int]  # process id -> bytes; in a container NVML names no process
    reserved_bytes: int = 0  # by the driver: neither free nor held by anybody
    uncorrected: int = 0  # ECC errors that could not be corrected, since the last reset
    recovery: str | None = None  # what the driver says must be done, "" for nothing; None: it does not say
    xids: tuple[int, ...] = ()  # critical events since the look before
    load: Load = Load()


class CardError(Exception):
    """NVML has no answer. `lost`: there will be none until somebody has done something about the card."""

    def __init__(self, message: str, lost: bool) -> None:
        super().__init__(message)
        self.lost = lost


class Card:
    """One GPU by NVML, which stays open between two looks, so that no event is missed.

    An open NVML keeps the card from being reset (`nvidia-smi --gpu-reset`): close it where a reset is waited for.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._open: tuple[Any, Any, Any] | None = None  # pynvml, the device, the set of events

    def read(self) -> Reading:
        """Raises CardError."""
        import pynvml

        try:
            nvml, device, events = self._open = self._open or self._opened()
            held, again = _held(nvml, device), None
            for _ in range(LOOKS):  # a process that begins or ends in between would count twice or not at all
                memory = nvml.nvmlDeviceGetMemoryInfo(device)
                again = _held(nvml, device)
                if again == held:
                    break
                held = again
            reserved = _where_told(nvml, lambda: int(_memory_v2(nvml, device).reserved), 0)
            return Reading(
                total_bytes=int(memory.total),
                free_bytes=int(memory.free),
                held=held,
                reserved_bytes=reserved,
                uncorrected=_where_told(nvml, lambda: _uncorrected(nvml, device), 0),
                recovery=_where_told(nvml, lambda: _recovery(nvml, device), None),
                xids=tuple(_xids(nvml, events)) if events is not None else (),
                load=_load(nvml, device, int(memory.total), int(memory.total - memory.free) - reserved),
            )
        except pynvml.NVMLError as error:
            self.close()
            gone = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_NOT_FOUND)
            raise CardError(str(error), error.value in gone) from error

    def _opened(self) -> tuple[Any, Any, Any]:
        import pynvml

        pynvml.nvmlInit()
        try:
            device = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
            return pynvml, device, _where_told(pynvml, lambda: _listen(pynvml, device), None)
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
            raise

    def close(self) -> None:
        if self._open is not None:
            nvml, _, events = self._open
            self._open = None
            with contextlib.suppress(nvml.NVMLError):
                if events is not None:
                    nvml.nvmlEventSetFree(events)
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()


def _where_told(nvml: Any, ask: Callable[[], Answer], otherwise: Answer) -> Answer:
    """Not every card and driver knows everything."""
    try:
        return ask()
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
        return otherwise


def _listen(nvml: Any, device: Any) -> Any:
    events = nvml.nvmlEventSetCreate()
    try:
        nvml.nvmlDeviceRegisterEvents(device, nvml.nvmlEventTypeXidCriticalError, events)
    except nvml.NVMLError:
        nvml.nvmlEventSetFree(events)
        raise
    return events


def _xids(nvml: Any, events: Any) -> Iterator[int]:
    with contextlib.suppress(nvml.NVMLError_Timeout):  # nothing more has happened
        while True:
            yield int(nvml.nvmlEventSetWait_v2(events, 0).eventData)


def _held(nvml: Any, device: Any) -> dict[int, int]:
    """Under MPS and without, and by what draws on a screen; where the driver does not tell the bytes, 0."""
    held: dict[int, int] = {}
    asked = (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetMPSComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    )
    for ask in asked:
        found: list[Any] = _where_told(nvml, partial(ask, device), [])
        for process in found:
            held[process.pid] = max(held.get(process.pid, 0), int(process.usedGpuMemory or 0))
    return held


def _memory_v2(nvml: Any, device: Any) -> Any:
    return nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2)


def _uncorrected(nvml: Any, device: Any) -> int:
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return int(nvml.nvmlDeviceGetTotalEccErrors(device, kind, since))


def _recovery(nvml: Any, device: Any) -> str | None:
    """The driver's own word, of drivers that have one (R560 and later)."""
    value = nvml.nvmlDeviceGetFieldValues(device, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])[0]
    if value.nvmlReturn != nvml.NVML_SUCCESS:
        return None
    return RECOVERY.get(int(value.value.uiVal), "a recovery that this release does not know")


def _load(nvml: Any, device: Any, total_bytes: int, used_bytes: int) -> Load:
    def gauge(ask: Callable[[], Answer]) -> Answer | None:
        try:
            return ask()
        except nvml.NVMLError:  # nothing that a job depends on
            return None

    return Load(
        total_bytes=total_bytes,
        used_bytes=max(0, used_bytes),
        utilization=gauge(lambda: int(nvml.nvmlDeviceGetUtilizationRates(device).gpu)),
        temperature_c=gauge(lambda: int(nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))),
        power_w=gauge(lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000),
        power_limit_w=gauge(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000),
    )


def machine_load() -> Load:
    """Of this machine's processors, since it was last asked, and main memory."""
    memory = psutil.virtual_memory()
    return Load(int(memory.total), int(memory.total - memory.available), round(psutil.cpu_percent()))


def usable(total_bytes: int, free_bytes: int, ours_bytes: int) -> int:
    """What the jobs of this worker may hold together: what nobody holds, and what they hold already."""
    return max(0, int(free_bytes + ours_bytes - HEADROOM * total_bytes))


def main_memory_bytes() -> int:
    """What jobs on the CPU may hold."""
    return int(psutil.virtual_memory().total * RAM_SHARE)
