"""What is said where a name is that of nothing: which name was meant, or where the names are listed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobqueue.errors import ArchivedError, NotFoundError

if TYPE_CHECKING:
    from jobqueue.store import Store

JOBS = "`loraq ls BATCH` lists the jobs of a batch, `loraq ls` the batches."


@contextmanager
def told(better: Callable[[str, Store], NotFoundError], name: str, store: Store) -> Iterator[None]:
    """Within the block a name of nothing is told by `better`, one of those below; that of an archived batch is left."""
    try:
        yield
    except ArchivedError:
        raise
    except NotFoundError:
        raise better(name, store) from None


def no_batch(name: str, store: Store) -> NotFoundError:
    what = f"there is no batch {name!r}"
    if store.jobs([name]):
        return NotFoundError(what, f"It is a job: `loraq show {name}` shows it.")
    return NotFoundError(what, _meant(name, store) or "See `loraq ls` for the batches that there are.")


def no_job(name: str, store: Store) -> NotFoundError:
    what = f"there is no job {name!r}"
    if name in store.batch_names():
        return NotFoundError(what, f"It is a batch: `loraq ls {name}` lists its jobs.")
    return NotFoundError(what, _among_its_batch(name, store) or _job_meant(name, store) or JOBS)


def neither(name: str, store: Store) -> NotFoundError:
    """Where a batch or a job would do."""
    do = _among_its_batch(name, store) or _job_meant(name, store) or _meant(name, store) or JOBS
    return NotFoundError(f"there is no batch or job {name!r}", do)


def no_worker(name: str, store: Store) -> NotFoundError:
    known = list(dict.fromkeys(each for worker in store.workers() for each in (worker.host, worker.id)))
    hint = _one_of(difflib.get_close_matches(name, known, n=3))
    do = hint or "See `loraq workers` for those that there are."
    return NotFoundError(f"there is no worker or host {name!r}", do)


def _meant(name: str, store: Store) -> str:
    return _one_of(difflib.get_close_matches(name, store.batch_names(), n=3))


def _among_its_batch(name: str, store: Store) -> str:
    """Where the jobs are listed, if only the end of a job's name is wrong."""
    of = [batch for batch in store.batch_names() if name.startswith(f"{batch}.")]
    return f"`loraq ls {max(of, key=len)}` lists the jobs that there are." if of else ""


def _job_meant(name: str, store: Store) -> str:
    """The job of that number of batches whose names look like the one that is given; of a trial, what trains it."""
    batch, dot, rest = name.replace("/", ".").partition(".")
    close = [f"{each}.{rest}" for each in difflib.get_close_matches(batch, store.batch_names(), n=3) if dot]
    return _one_of([job.id for job in store.jobs(close)])


def _one_of(names: list[str]) -> str:
    return f"Did you mean {' or '.join(names)}?" if names else ""
