"""What `cancel` and `retry` mean for a batch: which of its jobs, and in which order. What `drain` means for a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobqueue import names
from jobqueue.errors import LoraqError, NotFoundError
from jobqueue.job import Batch, FailureReason, Job, JobState, WorkerInfo

if TYPE_CHECKING:
    from jobqueue.store import Store

RETRIED = (JobState.FAILED, JobState.CANCELLED)

Changed = tuple[list[str], list[str]]
"""Ids of the jobs that were changed, and the memory classes whose workers are to be woken."""


def cancel(store: Store, target: str) -> Changed:
    """Stops a job or a batch. Raises NotFoundError."""
    batch = _batch(store, target)
    if batch is None:
        return store.cancel([_job(store, target).id])
    own = _ids(batch)
    # The last first: what waits for another is stopped on request, not for want of what it waits for.
    asked, classes = store.cancel(own[::-1])
    for job_id in set(batch.jobs) - set(own):
        more, woken = store.release_base(job_id)
        asked, classes = asked + more, classes + woken
    return sorted(asked, key=list(batch.jobs).index), classes


def retry(store: Store, target: str, *, failed_only: bool) -> Changed:
    """Runs again what ended without success. Raises NotFoundError."""
    batch = _batch(store, target)
    meant = store.jobs(batch.jobs) if batch else [_job(store, target)]
    siblings = store.jobs(store.batch(meant[0].batch).jobs) if not batch and meant[0].batch else meant
    begins = (JobState.FAILED,) if failed_only else RETRIED
    wanted = {job.id for job in meant if job.state in begins}
    for job in siblings:  # each after those that it waits for
        if job.reason is FailureReason.DEPENDENCY and wanted & set(job.needs):
            wanted.add(job.id)
    for job in reversed(siblings):
        if job.id in wanted:
            wanted |= {other.id for other in siblings if other.id in job.needs and other.state in RETRIED}
    if wanted:
        wanted |= {job.id for job in siblings if job.kind.control}
    return store.retry([job.id for job in siblings if job.id in wanted])


def own(store: Store, target: str) -> list[Job]:
    """A batch's jobs, without the evaluations that serve other batches too; or the one job of that id."""
    batch = _batch(store, target)
    return store.jobs(_ids(batch)) if batch else [_job(store, target)]


def drain(store: Store, target: str, *, undo: bool) -> list[WorkerInfo]:
    """Marks a worker or a host, or ends that; the workers that are meant. Raises NotFoundError, LoraqError."""
    marked = store.marked("drained")
    wider = [name for name in (target.partition("/")[0], target.partition("#")[0]) if name != target]
    if undo and (by := next((name for name in wider if name in marked), "")):
        raise LoraqError(
            f"{target} stays drained, as the whole of {by} is",
            f"loraq undrain {by}, then drain again which of its workers are to stay so.",
        )
    meant = [worker for worker in store.workers() if target in (worker.uid, worker.name, worker.host)]
    if not meant and not (undo and target in marked):
        raise names.no_worker(target, store)
    if target not in marked:
        _check_one_machine(target, meant)
    store.mark("drained", target, not undo)
    for worker in meant if undo else ():  # a wider word goes for all that it means
        store.mark("drained", worker.name, False)
        store.mark("drained", worker.uid, False)
    return meant


def _check_one_machine(target: str, meant: list[WorkerInfo]) -> None:
    """Two machines may have one name, which is noticed while both live."""
    living = [worker for worker in meant if worker.alive]
    several = len({worker.boot for worker in living}) > 1 or ("/" in target and len(living) > 1)
    if several:
        workers = " ".join(worker.uid for worker in living)
        raise LoraqError(f"{target} is the name of several machines or workers", f"Say which of {workers} is meant.")


def _batch(store: Store, target: str) -> Batch | None:
    try:
        return store.batch(target)
    except NotFoundError:
        return None


def _job(store: Store, target: str) -> Job:
    with names.told(names.neither, target, store):
        return store.job(target)


def _ids(batch: Batch) -> list[str]:
    return [job_id for job_id in batch.jobs if job_id.startswith(f"{batch.name}.")]
