"""The export of a trial that has succeeded: a plan of one job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobqueue.adapters import TRIAL
from jobqueue.errors import NotFoundError
from jobqueue.export_spec import ExportOptions
from jobqueue.job import Job, JobKind, JobState
from jobqueue.job_spec import ExportSpec, TrainSpec
from jobqueue.plan import Plan, PlannedJob, need_of
from jobqueue.spec import RunSpec
from jobqueue.sweep import Sweep, Trial


def batch_of_exports(batch: str) -> str:
    """What the batch of an export is called, where another one has not that name yet."""
    return f"{batch[:70]}-export"


def plan_export(name: str, options: ExportOptions, job_of: Callable[[str], Job]) -> Plan:
    """The batch that exports a trial (BATCH/NUMBER). Raises NotFoundError where it has trained nothing."""
    if not (named := TRIAL.fullmatch(name)):
        raise NotFoundError(f"{name!r} is no trial", "Write BATCH/NUMBER, as in medqa-rank/2; `loraq ls` has them.")
    batch, number = named.groups()
    job = job_of(f"{batch}.{number}")
    if job.kind is not JobKind.TRAIN:
        raise NotFoundError(f"{job.id} has trained nothing that could be exported", "Name a trial that was trained.")
    if job.state is not JobState.SUCCEEDED:
        raise NotFoundError(f"{job.id} has nothing to export yet: it is {job.state}", "Wait until it has succeeded.")
    train = TrainSpec.model_validate(job.spec, strict=False)
    spec = ExportSpec.of(train, job.id, options)
    planned = PlannedJob(f"{number}.export", JobKind.EXPORT, job.trial, spec, need_of(spec))
    run = RunSpec(name=batch_of_exports(batch), base_model=train.base_model, data=train.data, export=options)
    return Plan(Sweep(run.name, Path(name), [Trial(job.trial, {}, run)]), (planned,), {}, ())
