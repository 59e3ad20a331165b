"""The trainer process: `python -P -m gpu_worker.trainer.child`. Takes one job after the other, see protocol.py.

Nothing but this file writes on the events descriptor; standard output and standard error are the job's log.
A trainer that cannot give its memory back, or that failed in a way nobody foresaw, ends instead of going on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gpu_worker.protocol import EVENTS_FD, Event, Failed, Ready, Request, Result, encode
from gpu_worker.trainer.failures import bad_spec, failed, on_rung, one_line
from jobqueue.job import FailureReason
from jobqueue.job_spec import AskSpec, ControlSpec, ExportSpec, JobSpec, TrainSpec, WorkSpec

log = logging.getLogger("loraq.trainer")
# Of the GPU's memory, what may stay in tensors after a job: compiled functions keep a weight or two alive.
LEFT_OVER_SHARE = 0.01
ENDS_TRAINER = (FailureReason.OUT_OF_MEMORY.value, FailureReason.INTERNAL.value)
COMPILED = {"UNSLOTH_COMPILE_LOCATION": "unsloth", "TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton"}
"""Where each package keeps what it compiles: for the next trainer, too, and not in the working directory or in /tmp."""
QUIET = {
    "torch.utils._pytree": logging.ERROR,
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
    "datasets": logging.WARNING,
}
"""Loggers whose words at import stood first in every job's log, and are of no use to whoever reads it."""
BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC, of cuda.h
Emit = Callable[[Event], None]


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it asks for a checkpoint; there is nothing to save yet
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
    requests, emit = _channels()
    _environment()
    if os.environ.get("LORAQ_DEVICE") == "gpu":
        _sleep_on_gpu()
    _import()
    from gpu_worker.trainer import checkpoint, usage
    from gpu_worker.trainer import model as models

    checkpoint.listen()

    environment, warning = dict(os.environ), ""
    if models.ON_GPU and not select.select([requests], [], [], 0)[0]:  # it is a spare
        from gpu_worker.trainer.warm_up import warm_up

        warning = warm_up()
        gc.freeze()
    start = usage.allocated()
    emit(Ready(usage.versions(), warning))
    for line in requests:
        # What Unsloth and accelerate note there of one job, they read in the next: that all weights are trained, say.
        os.environ.clear()
        os.environ.update(environment)
        end = _run(Request(**json.loads(line)), emit)
        dirty = not _gives_back(start)
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(end, Result):
            end = replace(end, goes_on=not dirty)
        emit(end)
        if dirty or (isinstance(end, Failed) and end.reason in ENDS_TRAINER):
            return


def _channels() -> tuple[Any, Emit]:
    """Where requests come from and events go to; both out of reach of whatever else runs here."""
    requests = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    descriptor = int(os.environ.pop(EVENTS_FD))
    os.set_inheritable(descriptor, False)
    lock = threading.Lock()

    def emit(event: Event) -> None:
        data = encode(event)
        with lock:
            while data:
                data = data[os.write(descriptor, data) :]

    return requests, emit


def _environment() -> None:
    """Read by Unsloth, transformers and tokenizers when they are imported."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    if os.environ.get("LORAQ_DEVICE") == "gpu":
        os.environ["UNSLOTH_DISABLE_CPU_FALLBACK"] = "1"  # else it trains on the CPU without a word
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraq"
    cache = Path(os.environ.get("LORAQ_CACHE_DIR") or default).absolute()
    for variable, package in COMPILED.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # Triton is not for every machine
            os.environ.setdefault(variable, str(cache / package / importlib.metadata.version(package)))
    # Trainers that start together wait for each other there, one import after the other; 10 s are too short for many.
    os.environ.setdefault("UNSLOTH_LOCK_TIMEOUT", "600")
    # Threads that wait must not spin: on a CPU with other work to do a step took 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)


def _sleep_on_gpu() -> None:
    """Has CUDA let threads sleep that wait for the GPU: else each job of those that share it keeps a core busy so.

    PyTorch has no switch for it. It is to be said before there is a context.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:  # the import will say what is missing
        return
    device = ctypes.c_int()
    error = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    if error := error or cuda.cuDevicePrimaryCtxSetFlags_v2(device, BLOCKING_SYNC):
        log.warning("threads that wait for the GPU keep a core busy: CUDA error %d", error)


def _import() -> None:
    """What jobs take, so that a spare has it ready: Unsloth first, which sets how torch allocates memory.

    To look for garbage in it would take a quarter of the time. Afterwards it is exempt for good: Unsloth has garbage
    collected a dozen times before the first step, half a second each for what was imported.
    """
    gc.disable()
    from gpu_worker.trainer import model  # noqa: F401

    # isort: split
    from gpu_worker.trainer import train  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.enable()


def _gives_back(start: int) -> bool:
    """Frees the GPU's memory after a job. Returns whether no more is in use than the `start` bytes of the beginning."""
    from gpu_worker.trainer import model as models
    from gpu_worker.trainer import usage

    try:
        models.free()
        usage.hold_to(None)
        left = usage.allocated() - start
    except RuntimeError as error:  # a fault on the GPU is told again by all that is asked of it afterwards
        log.warning("this trainer ends, its GPU does not answer any more: %s", str(error).partition("\n")[0])
        return False
    if left > LEFT_OVER_SHARE * usage.total():
        log.warning("%.0f MiB of GPU memory did not come back; this trainer ends", left / 2**20)
        return False
    return True


def _run(request: Request, emit: Emit) -> Result | Failed:
    """One job. Afterwards nothing refers to what it held: not even an exception's frames."""
    try:
        return Result(_outcome(request, emit))
    except Exception as error:
        end = failed(error)
        if end.reason == FailureReason.INTERNAL.value:
            traceback.print_exc()
        else:
            log.error("%s", error)
        _forget(error)
        return end


def _outcome(request: Request, emit: Emit) -> dict[str, Any]:
    from gpu_worker.trainer import hub, usage
    from gpu_worker.trainer import model as models

    spec = _spec(request)
    models.check_dtype(spec.dtype)
    usage.hold_to(request.budget_bytes)
    with hub.asked_once(spec.base_model):
        return _work(spec, request, emit)


def _work(spec: WorkSpec, request: Request, emit: Emit) -> dict[str, Any]:
    if isinstance(spec, TrainSpec):
        from gpu_worker.trainer import parked
        from gpu_worker.trainer.train import train

        if os.environ.get("LORAQ_DEVICE") != "gpu":
            parked.forget()  # here it would be in the memory that the training is measured by
        return train(spec, request, emit)
    if isinstance(spec, AskSpec):
        from gpu_worker.trainer.ask import ask

        return ask(spec, request, emit)
    if isinstance(spec, ExportSpec):
        from gpu_worker.trainer.export import export

        return export(spec, request, emit)
    from gpu_worker.trainer.evaluate import evaluate

    batch = max(1, spec.evaluation.per_device_eval_batch_size >> request.rung)
    asked = spec.evaluation.model_copy(update={"per_device_eval_batch_size": batch})
    with on_rung(request.rung, last=batch == 1):
        return evaluate(spec.model_copy(update={"evaluation": asked}), request, emit)


def _spec(request: Request) -> WorkSpec:
    try:
        # From JSON: in Python's own values a list would be no tuple.
        spec = TypeAdapter[JobSpec](JobSpec).validate_json(json.dumps(request.spec))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, given = ".".join(map(str, first["loc"])), first["input"]
        which = "" if isinstance(given, (dict, list)) else f", not {given!r}"
        raise bad_spec(one_line(f"the job's spec is not valid: {place}: {first['msg']}{which}")) from error
    if isinstance(spec, ControlSpec):
        raise bad_spec(f"a trainer has nothing to do with a job of kind {spec.kind}")
    return spec


def _forget(error: BaseException | None) -> None:
    """Empty the frames of an exception and of those that caused it: they hold the model."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main()
