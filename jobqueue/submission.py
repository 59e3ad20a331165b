"""What a plan becomes when it is sent: records of jobs with the batch's name, and memory that is known by then."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from jobqueue.ensemble_spec import Members
from jobqueue.errors import CapacityError, ServerError, UnansweredError
from jobqueue.job import OF_NO_BATCH, WorkerInfo
from jobqueue.job_spec import ControlSpec, EvaluateSpec, ExportSpec, JobSpec, ReportSpec
from jobqueue.memory import GIB, kind_of
from jobqueue.plan import BATCH, Plan, PlannedJob
from jobqueue.storage import Storage
from jobqueue.store import NewJob, Store, Submitted


def check_keeping(store: Store) -> None:
    """Raises ServerError where the server would drop jobs."""
    keeping = store.keeping()
    if keeping.drops_jobs:
        raise ServerError(
            f"Redis at {store.where} drops jobs at its memory limit (maxmemory-policy {keeping.eviction}); "
            "nothing was submitted",
            "Set maxmemory-policy noeviction there, in its configuration and by CONFIG SET.",
        )


@contextmanager
def sent_in_doubt(key: str) -> Iterator[None]:
    """What to do where the server has not answered: it may have accepted the batch all the same."""
    try:
        yield
    except UnansweredError as error:
        raise UnansweredError(error.what, f"{error.do} {_again(key)}") from error


def written(plan: Plan, key: str, owner: str, store: Store, storage: Storage) -> Submitted:
    """All jobs of the plan in the server, under the first name that is free, or the batch that has that key.

    Args:
        key: the same for what is one batch however often it is sent; "": it is a new one each time.
    """
    name, number = plan.sweep.name, 1
    # What the storage has of that name may be of another server, or of a time that this one has forgotten; of the
    # same plan it may just as well be the batch itself.
    while (not key or store.submitted(key) is None) and storage.exists(f"batches/{name}"):
        number += 1
        name = f"{plan.sweep.name}-{number}"
    while (made := _written_as(name, plan, key, owner, store)) is None:
        number += 1
        name = f"{plan.sweep.name}-{number}"
    return made


def check_on_disk(made: Submitted, key: str, store: Store) -> None:
    """Raises ServerError where the server has not confirmed in time that the batch is on its disk."""
    if not made.on_disk:
        raise ServerError(
            f"{made.batch} is accepted, but Redis at {store.where} has not confirmed that it is on its disk",
            "Look after the server's disk. " + (_again(key) if key else f"`loraq ls {made.batch}` shows the batch."),
        )


def _again(key: str) -> str:
    return "Then submit again: sent twice, it is one batch." if key else "`loraq ls` shows whether it was accepted."


def _written_as(name: str, plan: Plan, key: str, owner: str, store: Store) -> Submitted | None:
    nonce = secrets.token_hex(8)
    jobs = [new_job(job, name, owner, nonce) for job in plan.jobs]
    base_model = plan.sweep.trials[0].run.base_model
    return store.submit(name, owner, len(plan.sweep.trials), base_model, jobs, [job.id for job in jobs], key)


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


def check_capacities(plan: Plan, workers: Sequence[WorkerInfo]) -> None:
    """As `check_capacity`, of the largest job for each kind of device."""
    needs: dict[str, int] = {}
    for job in plan.jobs:
        if not isinstance(job.spec, ControlSpec):
            device = job.spec.resources.device
            needs[device] = max(job.need_bytes, needs.get(device, 0))
    for asked, need in needs.items():
        check_capacity(need, asked, workers)


def check_capacity(need: int, device: str, workers: Sequence[WorkerInfo]) -> None:
    """Refuses what would wait for ever: workers are alive, and none of them could hold a job of `need` bytes, or none
    is of the kind that it asks for (`resources.device`).
    """
    alive = [worker for worker in workers if worker.alive and worker.usable_bytes]
    usable = [w.usable_bytes for w in alive if device == "auto" or (w.device == "cpu") == (device == "cpu")]
    if alive and not usable:
        raise CapacityError(
            f"a job asks for a {device.upper()} (resources.device), and no living worker has one",
            "Leave resources.device out, start such a worker, or submit with --force to let it wait for one.",
        )
    if usable and need > max(usable):
        raise CapacityError(
            f"a job needs about {need / GIB:.1f} GiB, and the largest worker has {max(usable) / GIB:.1f} GiB",
            "Lower max_seq_length or per_device_train_batch_size, set resources.memory if the estimate is wrong, "
            "start a larger worker, or submit with --force to let it wait for one.",
        )
