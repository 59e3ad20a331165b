"""What `cancel` and `retry` mean for a batch: which of its jobs, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobqueue import names
from jobqueue.errors import NotFoundError
from jobqueue.job import Batch, FailureReason, Job, JobState

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
