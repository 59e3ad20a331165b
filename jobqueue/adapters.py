"""Adapters that a training goes on from (`from_adapter`): which one is meant, and whether it fits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobqueue.base_model import HUB_ID
from jobqueue.data_spec import DataSpec
from jobqueue.errors import ArchivedError, NotFoundError, Problem, SpecError, StorageError
from jobqueue.job import Job, JobKind, JobState
from jobqueue.job_spec import EvaluateSpec, TrainSpec
from jobqueue.spec import LoraSpec

if TYPE_CHECKING:
    from jobqueue.plan import Plan

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STORED = "storage:"  # a folder of the storage
TRIAL = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)[/.](\d+)")
# What an adapter's weights mean nothing without; the names are the same in a spec and in PEFT's file.
SHARED = ("r", "lora_alpha", "use_rslora", "bias")


def locate(name: str, folder: Path) -> str:
    """A trial as the id of its training, a folder made absolute (relative to `folder`), a URL, a hub id or a folder of
    the storage as it is.

    Raises ValueError with a message for the user where it can be none of them.
    """
    path = Path(name).expanduser()
    path = path if path.is_absolute() else folder / path
    if "://" in name or name.startswith(STORED):
        return name
    if (path / CONFIG).is_file():
        return str(path.resolve())
    if path.exists():
        raise ValueError(f"{path} is no folder of an adapter: it has no {CONFIG}")
    if name.startswith(("/", "~")):
        return str(path)  # a worker may have it though this machine does not
    if trial := TRIAL.fullmatch(name):
        return ".".join(trial.groups())
    if HUB_ID.match(name) and "/" in name:
        return name
    raise ValueError(f"{name!r} is neither a trial (BATCH/NUMBER) nor a folder, URL or hub id of an adapter")


def in_storage(plan: Plan, job_of: Callable[[str], Job]) -> Plan:
    """The plan with each trial that training goes on from replaced by the folder where its adapter is.

    Raises SpecError where there is no such adapter, or it does not fit.
    """
    jobs, problems = [], []
    for job in plan.jobs:
        source = job.spec.from_adapter if isinstance(job.spec, (TrainSpec, EvaluateSpec)) else None
        if isinstance(job.spec, (TrainSpec, EvaluateSpec)) and source and TRIAL.fullmatch(source):
            try:
                earlier = job_of(source)
                spec = job.spec.model_copy(update={"from_adapter": f"{STORED}{_trained(earlier, job.spec)}/adapter"})
                job = replace(job, spec=_with_rows(spec, earlier) if isinstance(spec, TrainSpec) else spec)
            except ArchivedError as error:
                problems.append(f"{error.what}. {error.do}")
            except NotFoundError as error:
                problems.append(f"{error.what}; `loraq ls` lists the batches, and a trial is BATCH/NUMBER")
            except ValueError as error:
                problems.append(str(error))
        jobs.append(job)
    if problems:
        place = str(plan.sweep.file)
        raise SpecError([Problem(problem, place, path="from_adapter") for problem in dict.fromkeys(problems)])
    return replace(plan, jobs=tuple(jobs))


def _trained(job: Job, spec: TrainSpec | EvaluateSpec) -> str:
    """The folder of what `job` made. Raises ValueError where `spec` cannot go on from it."""
    if job.kind is not JobKind.TRAIN or job.spec["method"] == "full":
        raise ValueError(f"{job.id} has no adapter: it is {'all weights' if job.kind is JobKind.TRAIN else job.kind}")
    if job.state is not JobState.SUCCEEDED:
        raise ValueError(f"{job.id} has no adapter: it is {job.state}; submit once it has succeeded")
    if job.spec["lora"].get("loftq_config"):
        raise ValueError(f"{job.id} was trained with loftq_config, on a base model of its own: take a plain adapter")
    theirs, ours = (job.spec["base_model"], job.spec.get("revision")), (spec.base_model, spec.revision)
    if theirs != ours:
        then, now = ("@".join(filter(None, model)) for model in (theirs, ours))
        raise ValueError(f"{job.id} was trained on {then}, and this trains {now}")
    folder = str(job.outcome["folder"])
    if isinstance(spec, EvaluateSpec):
        return folder
    wrong = misfits(spec.lora, job.spec["lora"])
    modules = (_modules(job.spec["lora"]["target_modules"]), _modules(spec.lora.target_modules))
    if modules[0] != modules[1]:
        wrong.append(f"target_modules: {modules[0]}")
    if wrong:
        raise ValueError(f"{job.id} does not fit; as it was trained, set under lora: {', '.join(wrong)}")
    return folder


def _with_rows(spec: TrainSpec, earlier: Job) -> TrainSpec:
    """With those that the earlier trial was trained on, where `ewc` names none."""
    if spec.ewc is None or spec.ewc.data is not None:
        return spec
    data = DataSpec.model_validate_json(json.dumps({**earlier.spec["data"], "replay": None}))
    return spec.model_copy(update={"ewc": spec.ewc.model_copy(update={"data": data})})


def download(url: str, into: Path) -> Path:
    """The adapter at a URL that fsspec reads. Raises NotFoundError, StorageError."""
    import fsspec

    into.mkdir(exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        address = f"{url.rstrip('/')}/{name}"
        try:
            with fsspec.open(address, "rb") as there, (into / name).open("wb") as here:
                shutil.copyfileobj(there, here)
        except FileNotFoundError:
            raise NotFoundError(f"from_adapter: there is no {address}", "Correct from_adapter.") from None
        except Exception as error:  # each kind of storage has its own
            raise StorageError(f"{address} cannot be read: {error}", "Try again once it can.") from error
    return into


def misfits(lora: LoraSpec, trained: Mapping[str, Any]) -> list[str]:
    """What the section `lora` would have to say for weights that were trained so (a spec's or PEFT's names)."""
    return [f"{key}: {_yaml(trained[key])}" for key in SHARED if key in trained and trained[key] != getattr(lora, key)]


def _modules(given: Any) -> str:
    return given if isinstance(given, str) else f"[{', '.join(sorted(given))}]"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
