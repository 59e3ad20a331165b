"""What a client sees of a server and its storage: batches, jobs, workers, reports. It changes nothing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from jobqueue import names
from jobqueue.archive import Lookup
from jobqueue.configuration import read_settings
from jobqueue.embedded import connect_url
from jobqueue.errors import NotFoundError, StorageError
from jobqueue.job import JobKind
from jobqueue.location import MARK
from jobqueue.storage import Storage

if TYPE_CHECKING:
    from jobqueue.events import Event
    from jobqueue.job import Batch, Job, WorkerInfo
    from jobqueue.overview import Overview
    from jobqueue.published import Source
    from jobqueue.results import BatchReport
    from jobqueue.settings import Settings
    from jobqueue.store import Store

NEWEST = 100  # batches that are listed
LISTED = 200  # jobs in each list of an overview


class View:
    """Connects when it is first needed. Every method may raise ServerError.

    A method imports by itself what only it needs: looking at batches takes no pydantic, which doubles a command's time.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or read_settings()

    @cached_property
    def store(self) -> Store:
        from jobqueue.store import Store

        return Store(connect_url(self.settings), timeout_s=self.settings.timeout_s)

    @cached_property
    def storage(self) -> Storage:
        return Storage(self.settings.storage_url)

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self.store, self._source)

    def _source(self) -> Source | None:
        """What gives files of the storage: itself where this machine can read it, else a control worker if one lives.

        None: neither is there. A folder that is known, but not mounted here, has no mark.
        """
        if self.storage_is_known:
            with suppress(StorageError):
                if self.storage.exists(MARK):
                    return self.storage
        if any(worker.alive and not worker.trains for worker in self.workers()):
            from jobqueue.download import Reader

            return Reader(self.store)
        return self.storage if self.storage_is_known else None

    @property
    def storage_is_known(self) -> bool:
        """Whether this machine can reach the workers' storage."""
        return self.settings.storage is not None or self.settings.redis_url is None

    def _known_storage(self) -> Storage:
        if not self.storage_is_known:
            raise StorageError("this machine does not know the workers' storage", "Set LORAQ_STORAGE, as they have it.")
        return self.storage

    def warnings(self) -> list[str]:
        """What is set wrong on the server, so that it may lose jobs; one line each."""
        return [f"Redis at {self.store.where} {text}" for text in self.store.keeping().warnings]

    def batches(self) -> list[Batch]:
        """The newest, newest first; not those that were archived."""
        found = []
        for name in self.store.batch_names(NEWEST):
            with suppress(NotFoundError):  # removed or archived since
                found.append(self.store.batch(name))
        return found

    def batch(self, name: str) -> Batch:
        with names.told(names.no_batch, name, self.store):
            return self._lookup.batch(name)

    def jobs(self, batch: str) -> list[Job]:
        """All jobs of a batch, evaluations of base models and the report included."""
        with names.told(names.no_batch, batch, self.store):
            return self._lookup.jobs(batch)

    def job(self, job_id: str) -> Job:
        with names.told(names.no_job, job_id, self.store):
            return self._lookup.job(job_id)

    def workers(self) -> list[WorkerInfo]:
        return self.store.workers()

    def overview(self, owner: str = "", host: str = "", most: int = LISTED) -> Overview:
        """Workers, what runs and what waits, as they are at one moment: one cheap call of the server.

        Args:
            owner: only this one's jobs.
            host: only this host's, or worker's, workers and what runs there.
            most: jobs in each of its two lists; counts are of all. The server reads so many records in one go.
        """
        return self.store.overview(owner, host, most)

    def events(self, job_id: str, after: str = "0", block_s: float = 0) -> list[Event]:
        """At most 1,000 entries of a job's stream after the one of that id; waits up to `block_s` for one."""
        return self.store.events(job_id, after, block_s)

    def report(self, batch: str) -> BatchReport:
        """What the report job made, or, where it has not run, one of what is settled so far."""
        found, jobs = self.batch(batch), self.jobs(batch)
        made = next((job.outcome for job in jobs if job.kind is JobKind.REPORT and job.outcome), None)
        if made:
            from jobqueue.results import BatchReport

            report = BatchReport.from_dict(made)
        else:
            from jobqueue.aggregate import build_report

            report = build_report(found, jobs)
        if self.storage_is_known:
            from jobqueue import cards

            with suppress(StorageError):  # the report itself needs no storage
                report = replace(report, people=cards.imported(batch, self.storage))
        return report.priced(self.settings.gpu_hour_price)
