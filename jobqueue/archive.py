"""Batches that ended long ago: their records move from the server to the storage, and are read there from then on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobqueue.errors import ArchivedError, LoraqError, NotFoundError, ServerError, StorageError
from jobqueue.job import Batch, Job
from jobqueue.storage import Storage, job_folder

if TYPE_CHECKING:
    from jobqueue.published import Source
    from jobqueue.store import Store

FILE = "archive.json"
DAY_S = 24 * 3600.0
MOST = 20  # batches that one look archives

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archived:
    """What the server had of a batch."""

    batch: Batch
    jobs: list[Job]  # evaluations of base models included, which may be made anew, or go, on the server


def archive(store: Store, storage: Storage, name: str) -> bool:
    """Moves the records of an ended batch from the server to the storage; False: a job of it has been at work since,
    or somebody is still to be told of its end.

    They leave the server only once the storage has them. Several may do this at once, and a retry may come in between.
    Raises NotFoundError where there is no such batch, StorageError, ServerError.
    """
    if store.is_to_be_told(name):
        return False
    jobs = store.jobs(store.batch(name).jobs)
    # Looked at last: what is gone by then may have gone while the jobs were read, and another has written them.
    records = Archived(store.batch(name), jobs)
    own = [job for job in records.jobs if job.id.startswith(f"{name}.")]
    if not all(job.state.final for job in own):
        return False
    file, text = f"batches/{name}/{FILE}", json.dumps(asdict(records))
    storage.pin()  # the folder below a mount that has gone can be written, too
    storage.write_text(file, text)
    if storage.local:
        _to_disk(Path(storage.address(file)))
    if storage.read_text(file) != text:
        raise StorageError(f"{file} is not what was written to the storage {storage.url}", "Look after the storage.")
    storage.pin()
    try:
        return store.archive(name, own)
    except NotFoundError:  # removed meanwhile
        storage.remove(file)
        raise


def _to_disk(file: Path) -> None:
    """What is in the memory of this host alone goes with its power, and Redis has forgotten it by then."""
    try:
        for path in (file, file.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{file} cannot be brought to the disk: {error}", "Look after the storage.") from error


def archive_old(store: Store, storage: Storage, days: float) -> int:
    """Archives some of the batches that ended so many days ago; how many. What cannot be archived stays as it is."""
    done = 0
    try:
        for name in store.ended_before(days * DAY_S):
            try:
                if archive(store, storage, name):
                    done += 1
                    log.info("%s: archived", name)
                if done == MOST:
                    break
            except NotFoundError:
                pass  # removed meanwhile, or archived by another worker
            except (StorageError, ServerError):
                raise
            except Exception:  # records that this release cannot read must not keep others on the server
                log.exception("%s: not archived", name)
    except LoraqError as error:
        log.warning("not archived, to be tried again: %s", error.what)
    return done


def log_file(job: Job) -> str:
    """Where the storage has what the last attempt of a job has printed; of one that failed the nonce is not known."""
    folder = job.outcome.get("folder") or f"{job_folder(job.id, job.batch)}/{job.attempt}-*"
    return f"{folder}/log.txt"


class Lookup:
    """Batches and jobs wherever they are: on the server, or in the storage.

    Raises NotFoundError as the store does, StorageError, and ArchivedError where nothing gives the storage's files.
    """

    def __init__(self, store: Store, source: Callable[[], Source | None]) -> None:
        self._store, self._source = store, source

    def batch(self, name: str) -> Batch:
        try:
            return self._store.batch(name)
        except ArchivedError as error:
            return self._read(error.batch).batch

    def jobs(self, name: str) -> list[Job]:
        """All jobs of a batch."""
        try:
            return self._store.jobs(self._store.batch(name).jobs)
        except ArchivedError as error:
            return self._read(error.batch).jobs

    def job(self, job_id: str) -> Job:
        try:
            return self._store.job(job_id)
        except ArchivedError as error:
            for name in error.batches:
                for job in self._read(name).jobs:
                    if job.id == job_id:
                        return job
            do = f"See `loraq ls {error.batch}` for the jobs that there are."
            raise NotFoundError(f"there is no job {job_id!r}", do) from None

    def _read(self, name: str) -> Archived:
        from pydantic import TypeAdapter

        source = self._source()
        if source is None:
            do = "Set LORAQ_STORAGE, as the workers have it, or start a control worker, to read it."
            raise ArchivedError(name, do=do)
        file = f"batches/{name}/{FILE}"
        try:
            return TypeAdapter(Archived).validate_python(json.loads(source.read_text(file)))
        except NotFoundError as error:
            raise StorageError(
                f"{name} was archived, and {error.what}", "Set LORAQ_STORAGE, as the workers have it."
            ) from None
        except ValueError as error:
            why = str(error).partition("\n")[0]
            raise StorageError(
                f"{file} cannot be read: {why}", "It may be of a newer release: update loraq."
            ) from error
