"""`loraq preview` by a worker: from a sweep to its job, and back. It is of no batch, and soon forgotten."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, TypeAdapter

from jobqueue.data_spec import Part
from jobqueue.errors import CapacityError
from jobqueue.job import Job, JobKind
from jobqueue.memory import PREVIEW
from jobqueue.plan import located
from jobqueue.preview import Preview
from jobqueue.retry import check_succeeded
from jobqueue.spec import RunSpec
from jobqueue.store import NewJob, Store
from jobqueue.sweep import Sweep

LOOK_S = 0.2
PRIORITY = 101  # as of a question: somebody waits for it


class PreviewSpec(Part):
    """A job that shows what a training would read."""

    kind: Literal["preview"] = "preview"
    run: RunSpec
    """Its sources as a worker finds them."""
    row: PositiveInt | None
    data_alone: bool
    """Nobody has said yet how to train."""
    tokens: bool
    """False: there is no base model whose tokenizer could be taken."""


def job_of(
    sweep: Sweep, row: int | None, owner: str, *, data_alone: bool, tokens: bool, workers_are_here: bool
) -> tuple[NewJob, dict[str, Path]]:
    """The job for the first configuration of a sweep, and the files that must be in the storage for it, by source.

    Raises SpecError, DataError.
    """
    run, files = located(sweep, tokens=tokens, workers_are_here=workers_are_here)
    spec = PreviewSpec(run=run, row=row, data_alone=data_alone, tokens=tokens)
    job = NewJob(
        id=f"preview-{secrets.token_hex(6)}",
        kind=JobKind.PREVIEW.value,
        batch="",
        trial="",
        owner=owner,
        spec=spec.model_dump_json(),
        device="control",
        priority=PRIORITY,
        queue=PREVIEW,
        need=0,
        needs=(),
        follows=(),
        submission=secrets.token_hex(8),
    )
    return job, files


def check_alive(store: Store) -> None:
    """Raises CapacityError where no worker is alive that could do it."""
    if not any(worker.alive and not worker.trains for worker in store.workers()):
        raise CapacityError(
            "no control worker is alive to make the preview", "Start one: `loraq worker` on a GPU host, or `loraq up`."
        )


def ended(store: Store, job_id: str, timeout_s: float) -> Job:
    """The job once it has ended. Raises CapacityError where it does not begin in time, or not end in as much again."""
    until, begun = time.monotonic() + timeout_s, False
    while not (job := store.job(job_id)).state.final:
        if not begun and job.claimed_at:
            begun, until = True, time.monotonic() + timeout_s
        if time.monotonic() >= until:
            raise CapacityError(
                f"no control worker has {'ended' if begun else 'begun'} the preview within {timeout_s:g} s",
                "See `loraq workers`; that of a GPU host can do it, where `loraq[worker]` is installed.",
            )
        time.sleep(LOOK_S)
    return job


def preview_of(job: Job, sweep: Sweep) -> Preview:
    """What the job has made, in the words of the user's file. Raises LoraqError where it has not succeeded."""
    check_succeeded(job, "no worker has made the preview")
    run = sweep.trials[0].run
    assert run.data is not None, "else there is no such job"
    made = TypeAdapter(Preview).validate_python(job.outcome)
    return replace(made, source=run.data.source, base_model=run.base_model)
