"""What a plan becomes when it is sent: records of jobs with the batch's name, and memory that is known by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobqueue.ensemble_spec import Members
from jobqueue.errors import CapacityError
from jobqueue.job import OF_NO_BATCH, WorkerInfo
from jobqueue.job_spec import ControlSpec, EvaluateSpec, ExportSpec, JobSpec, ReportSpec
from jobqueue.memory import GIB, kind_of
from jobqueue.plan import BATCH, Plan, PlannedJob
from jobqueue.store import NewJob, Store


def corrected(plan: Plan, store: Store) -> Plan:
    """With the memory that such jobs were measured to take."""
    return replace(plan, jobs=tuple(corrected_job(job, store) for job in plan.jobs))


def corrected_job(job: PlannedJob, store: Store) -> PlannedJob:
    if isinstance(job.spec, ControlSpec) or job.spec.resources.memory is not None:
        return job
    factor = store.correction(kind_of(job.spec.model_dump()))
    return replace(job, need_bytes=int(job.need_bytes * factor))


def new_job(job: PlannedJob, batch: str, owner: str, submission: str) -> NewJob:
    def full(job_id: str) -> str:
        return job_id if job_id.startswith(OF_NO_BATCH) else f"{batch}.{job_id}"

    resources = None if isinstance(job.spec, ControlSpec) else job.spec.resources
    return NewJob(
        id=full(job.id),
        kind=job.kind.value,
        batch="" if job.shared else batch,
        trial=job.trial,
        owner=owner,
        spec=_named(job.spec, batch).model_dump_json(),
        device=resources.device if resources else "control",
        priority=resources.priority if resources else 0,
        queue=job.queue,
        need=job.need_bytes,
        needs=tuple(map(full, job.needs)),
        follows=tuple(map(full, job.follows)),
        submission=submission,
    )


def _named(spec: JobSpec, batch: str) -> JobSpec:
    """With the batch's name where the plan left it open."""

    def members(found: Members) -> Members:
        return found.model_copy(update={"trains": tuple(train.replace(BATCH, batch) for train in found.trains)})

    if isinstance(spec, ReportSpec):
        spec = spec.model_copy(update={"votes": tuple(map(members, spec.votes))})
    if isinstance(spec, ControlSpec):
        return spec.model_copy(update={"batch": batch})
    if isinstance(spec, EvaluateSpec) and spec.members is not None:
        return spec.model_copy(update={"members": members(spec.members)})
    if isinstance(spec, (EvaluateSpec, ExportSpec)) and spec.adapter_job is not None:
        return spec.model_copy(update={"adapter_job": spec.adapter_job.replace(BATCH, batch)})
    return spec


def check_capacity(need: int, workers: Sequence[WorkerInfo]) -> None:
    """Refuses what would wait for ever: workers are alive, and none of them could hold a job of `need` bytes."""
    usable = [worker.usable_bytes for worker in workers if worker.alive and worker.usable_bytes]
    if usable and need > max(usable):
        raise CapacityError(
            f"a job needs about {need / GIB:.1f} GiB, and the largest worker has {max(usable) / GIB:.1f} GiB",
            "Lower max_seq_length or per_device_train_batch_size, set resources.memory if the estimate is wrong, "
            "start a larger worker, or submit with --force to let it wait for one.",
        )
