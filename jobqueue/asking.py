"""`loraq ask`: from a trial and prompts to the job that answers them. It is of no batch, and soon forgotten."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobqueue import names
from jobqueue.errors import CapacityError, DataError, LoraqError, NotFoundError
from jobqueue.job import Job, JobKind, JobState
from jobqueue.job_spec import AskSpec
from jobqueue.plan import PlannedJob, need_of
from jobqueue.spec import ResourcesSpec
from jobqueue.store import NewJob, Store
from jobqueue.submission import check_capacity, corrected_job, new_job

TRIAL = re.compile(r"([A-Za-z0-9][\w.-]*)[/.]([A-Za-z0-9][\w-]*)")
PRIORITY = 101  # above all that a sweep file can say: somebody waits for the answer
MOST_PROMPTS, MOST_BYTES = 1_000, 2**20  # of one job: the answers go into its record


def question(store: Store, trial: str, prompts: Sequence[str], owner: str, options: Mapping[str, Any]) -> NewJob:
    """The job that puts `prompts` to a trial: BATCH/NUMBER, or BATCH/NAME of merged adapters.

    The model is loaded as the trial was trained, and each prompt stands behind the system prompt of its training data,
    unless `options`, fields of AskSpec, say otherwise. Raises NotFoundError, DataError, CapacityError where nobody is
    there to answer, and LoraqError where the trial has not succeeded.
    """
    _check(prompts)
    made_by = _trained(store, trial)
    made = made_by.spec
    of_model = ("base_model", "revision", "method", "dtype", "chat_template")
    as_trained = {name: made.get(name) for name in of_model} | {
        "load_in_4bit": made["method"] == "qlora",
        "max_seq_length": (made.get("training") or made)["max_seq_length"],
        "system_prompt": (made.get("data") or made["evaluation"]).get("system_prompt"),
        "resources": ResourcesSpec(device=made["resources"].get("device", "auto")),
    }
    spec = AskSpec.model_validate({**as_trained, "adapter_job": made_by.id, "prompts": tuple(prompts), **options})
    planned = PlannedJob(f"ask-{secrets.token_hex(6)}", JobKind.ASK, made_by.trial, spec, need_of(spec))
    job = replace(new_job(corrected_job(planned, store), "", owner, secrets.token_hex(8)), priority=PRIORITY)
    workers = store.workers()
    if not any(worker.alive and worker.trains for worker in workers):
        raise CapacityError("no worker is alive to answer", "Start one: `loraq worker` on a GPU host, or `loraq up`.")
    check_capacity(job.need, job.device, workers)
    return job


def _check(prompts: Sequence[str]) -> None:
    if not prompts or not all(map(str.strip, prompts)):
        raise DataError("a prompt is empty" if prompts else "there is no prompt", "Say what is to be asked.")
    size = sum(len(prompt.encode()) for prompt in prompts)
    if len(prompts) > MOST_PROMPTS or size > MOST_BYTES:
        raise DataError(
            f"{len(prompts):,} prompts of {size:,} bytes are too much at once",
            f"Ask at most {MOST_PROMPTS:,} of {MOST_BYTES:,} bytes in all, or evaluate a data set.",
        )


def _trained(store: Store, trial: str) -> Job:
    """The job that made the adapter: a trial's training, or the evaluation of merged ones. It has succeeded."""
    named = TRIAL.fullmatch(trial)
    if named is None:
        raise NotFoundError(f"{trial!r} is no trial", "A trial is BATCH/NUMBER: `loraq ls BATCH` shows the numbers.")
    with names.told(names.no_batch, named[1], store):
        batch = store.batch(named[1])
    found = [
        job for job in store.jobs([".".join(named.groups())]) if job.kind is JobKind.TRAIN or job.spec.get("members")
    ]
    if not found:
        raise NotFoundError(f"{batch.name} has no trial {named[2]}", f"See `loraq ls {batch.name}`.")
    [job] = found
    if job.state is not JobState.SUCCEEDED:
        do = f"`loraq show {job.id}` says why." if job.state.final else f"`loraq watch {batch.name}` follows it."
        raise LoraqError(f"{trial} has no adapter to ask: it is {job.state}", do)
    return job
