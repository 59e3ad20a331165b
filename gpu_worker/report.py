"""The report task: aggregates a batch whose jobs have ended; needs no GPU, runs on a control worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jobqueue.errors import NotFoundError
from jobqueue.job import Claim, Job, JobKind, JobState
from jobqueue.results import build_report
from jobqueue.storage import Storage
from jobqueue.store import Store


def make_report(claim: Claim, store: Store, storage: Storage) -> dict[str, Any]:
    """The BatchReport of the claim's batch as a dict; also written to `batches/<batch>/report.json`.

    Raises StorageError where the storage cannot be read or written.
    """
    batch = store.batch(claim.spec["batch"])
    jobs = store.jobs(batch.jobs)
    report = build_report(batch, jobs, {job.id: _picks(job, storage) for job in jobs if _scored(job)}).to_dict()
    storage.write_text(f"batches/{batch.name}/report.json", json.dumps(report, indent=1))
    return report


def _scored(job: Job) -> bool:
    return job.kind is JobKind.EVALUATE and job.state is JobState.SUCCEEDED


def _picks(job: Job, storage: Storage) -> Mapping[int, bool]:
    """Question -> whether the answer was right, by the first metric that was asked for."""
    try:
        text = storage.read_text(f"{job.outcome['folder']}/questions.jsonl")
    except NotFoundError:
        return {}
    metric = "likelihood" if "likelihood" in job.outcome else "generated"
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["index"]: metric in row["right"] for row in rows}
