"""NVML as files say it is: stands in front of the real module on PYTHONPATH, whose errors and names it has.

Xids, ECC errors and lost cards cannot be provoked. FAKE_NVML names a folder with a JSON file for each GPU, `0.json`
and so on: `total`, `free`, `held` (pid -> bytes),
`busy` (percent), `temperature`, `power` and `power_limit` (mW; absent: the card does not tell),
`uncorrected`, `recovery` (a number; absent: the driver does not say), `xids` (each told once), `error` (a name after
NVML_ERROR_, instead of any answer about the card), `hangs` (seconds).
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

_here = Path(__file__).parent
_folder = next(Path(p) for p in sys.path if p and Path(p) != _here and (Path(p) / "pynvml.py").exists())
_spec = importlib.util.spec_from_file_location("pynvml_itself", _folder / "pynvml.py")
_real = importlib.util.module_from_spec(_spec)
sys.modules["pynvml_itself"] = _real  # it looks itself up
_spec.loader.exec_module(_real)
globals().update({name: value for name, value in vars(_real).items() if not name.startswith("__")})

_told = {}  # GPU -> Xids


def _state(device):
    state = json.loads(Path(os.environ["FAKE_NVML"], f"{device}.json").read_text())
    time.sleep(state.get("hangs", 0))
    if error := state.get("error"):
        raise NVMLError(getattr(_real, f"NVML_ERROR_{error}"))  # noqa: F821
    return state


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(list(Path(os.environ["FAKE_NVML"]).glob("*.json")))


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetHandleByUUID(uuid):
    device = int(uuid.rpartition("-")[2])
    _state(device)
    return device


def nvmlDeviceGetName(device):
    return "NVIDIA Fake 80GB"


def nvmlDeviceGetUUID(device):
    return f"GPU-fa4e0000-0000-0000-0000-{device:012d}"


def nvmlDeviceGetMemoryInfo(device, version=None):
    state = _state(device)
    return SimpleNamespace(total=state["total"], free=state["free"], reserved=state.get("reserved", 0))


def _told_by(device, name):
    state = _state(device)
    if name not in state:
        raise NVMLError(_real.NVML_ERROR_NOT_SUPPORTED)  # noqa: F821
    return state[name]


def nvmlDeviceGetUtilizationRates(device):
    return SimpleNamespace(gpu=_told_by(device, "busy"), memory=0)


def nvmlDeviceGetTemperature(device, sensor):
    assert sensor == _real.NVML_TEMPERATURE_GPU
    return _told_by(device, "temperature")


def nvmlDeviceGetPowerUsage(device):
    return _told_by(device, "power")


def nvmlDeviceGetEnforcedPowerLimit(device):
    return _told_by(device, "power_limit")


def nvmlDeviceGetComputeRunningProcesses(device):
    return [SimpleNamespace(pid=int(pid), usedGpuMemory=held) for pid, held in _state(device).get("held", {}).items()]


def nvmlDeviceGetMPSComputeRunningProcesses(device):
    raise NVMLError(_real.NVML_ERROR_NOT_SUPPORTED)  # noqa: F821


def nvmlDeviceGetGraphicsRunningProcesses(device):
    return []


def nvmlDeviceGetTotalEccErrors(device, kind, since):
    assert (kind, since) == (_real.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, _real.NVML_VOLATILE_ECC)
    return _state(device).get("uncorrected", 0)


def nvmlDeviceGetFieldValues(device, fields):
    assert fields == [_real.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
    action = _state(device).get("recovery")
    known = _real.NVML_SUCCESS if action is not None else _real.NVML_ERROR_NOT_SUPPORTED
    return [SimpleNamespace(nvmlReturn=known, value=SimpleNamespace(uiVal=action or 0))]


def nvmlEventSetCreate():
    return []


def nvmlEventSetFree(events):
    pass


def nvmlDeviceRegisterEvents(device, kinds, events):
    assert kinds == _real.nvmlEventTypeXidCriticalError
    events.append(device)


def nvmlEventSetWait_v2(events, timeout_ms):
    (device,) = events
    told, xids = _told.get(device, 0), _state(device).get("xids", [])
    if told >= len(xids):
        raise NVMLError(_real.NVML_ERROR_TIMEOUT)  # noqa: F821
    _told[device] = told + 1
    return SimpleNamespace(eventData=xids[told])
