"""The report task: aggregates a batch whose jobs have ended; needs no GPU, runs on a control worker."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from gpu_worker.patience import Patience
from jobqueue.aggregate import build_report
from jobqueue.answers import FILE, Answers, read_answers
from jobqueue.errors import NotFoundError
from jobqueue.job import Claim, Job, JobKind, JobState
from jobqueue.ratings import JUDGEMENTS, judge_ratings
from jobqueue.storage import Storage
from jobqueue.store import Store


def make_report(claim: Claim, store: Store, storage: Storage, patience: Patience) -> dict[str, Any]:
    """The BatchReport of the claim's batch as a dict; also written to `batches/<batch>/report.json`.

    Raises StorageError where the storage cannot be read or written, or hangs; computing may take as long as it does.
    """
    batch = store.batch(claim.spec["batch"])
    jobs = store.jobs(batch.jobs)
    answers = patience("read the answers", lambda: {job.id: _answers(job, storage) for job in jobs if _scored(job)})
    report = build_report(batch, jobs, answers)
    judging = next((job for job in jobs if job.kind is JobKind.JUDGE and job.state is JobState.SUCCEEDED), None)
    if judging is not None:
        file = f"{judging.outcome['folder']}/{JUDGEMENTS}"
        lines = patience("read the judgements", lambda: storage.read_text(file))
        report = replace(report, judge=judge_ratings(report, judging.outcome, lines))
    name, text = f"batches/{batch.name}/report.json", json.dumps(report.to_dict(), indent=1)
    patience("write the report", lambda: storage.write_text(name, text))
    return report.to_dict()


def _scored(job: Job) -> bool:
    return job.kind is JobKind.EVALUATE and job.state is JobState.SUCCEEDED


def _answers(job: Job, storage: Storage) -> Answers:
    try:
        return read_answers(storage.read_text(f"{job.outcome['folder']}/{FILE}"))
    except NotFoundError:
        return {}
