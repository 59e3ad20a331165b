"""`loraq ask`: from a trial and prompts to the job that answers them. It is of no batch, and soon forgotten."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobqueue.adapters import TRIAL
from jobqueue.errors import CapacityError, DataError, LoraqError, NotFoundError
from jobqueue.job import Job, JobKind, JobState
from jobqueue.plan import PlannedJob, need_of
from jobqueue.spec import AskSpec, ResourcesSpec
from jobqueue.store import NewJob, Store
from jobqueue.submission import check_capacity, corrected_job, new_job

PRIORITY = 101  # above all that a sweep file can say: somebody waits for the answer
MOST_PROMPTS, MOST_BYTES = 1_000, 2**20  # of one job: the answers go into its record


def question(store: Store, trial: str, prompts: Sequence[str], owner: str, options: Mapping[str, Any]) -> NewJob:
    """The job that puts `prompts` to a trial (BATCH/NUMBER); `options` are fields of its AskSpec.

    The model is loaded as the trial was trained, and each prompt stands behind the system prompt of its training data,
    unless `options` say otherwise. Raises NotFoundError, DataError, CapacityError where nobody is there to answer, and
    LoraqError where the trial has not succeeded.
    """
    _check(prompts)
    train = _trained(store, trial)
    as_trained = {name: train.spec.get(name) for name in ("base_model", "revision", "method", "chat_template")} | {
        "load_in_4bit": train.spec["method"] == "qlora",
        "max_seq_length": train.spec["training"]["max_seq_length"],
        "system_prompt": train.spec["data"].get("system_prompt"),
        "resources": ResourcesSpec(device=train.spec["resources"].get("device", "auto")),
    }
    spec = AskSpec.model_validate({**as_trained, "adapter_job": train.id, "prompts": tuple(prompts), **options})
    planned = PlannedJob(f"ask-{secrets.token_hex(6)}", JobKind.ASK, train.trial, spec, need_of(spec))
    job = replace(new_job(corrected_job(planned, store), "", owner, secrets.token_hex(8)), priority=PRIORITY)
    workers = store.workers()
    if not any(worker.alive and worker.device != "control" for worker in workers):
        raise CapacityError("no worker is alive to answer", "Start one: `loraq worker` on a GPU host, or `loraq up`.")
    check_capacity(job.need, workers)
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
    """The training of a trial that has succeeded."""
    named = TRIAL.fullmatch(trial)
    if named is None:
        raise NotFoundError(f"{trial!r} is no trial", "A trial is BATCH/NUMBER: `loraq ls BATCH` shows the numbers.")
    batch = store.batch(named[1])
    try:
        train = store.job(".".join(named.groups()))
    except NotFoundError:
        train = None
    if train is None or train.kind is not JobKind.TRAIN:
        raise NotFoundError(f"{batch.name} has no trial {named[2]}", f"See `loraq ls {batch.name}`.")
    if train.state is not JobState.SUCCEEDED:
        do = (
            f"`loraq watch {batch.name}` follows it." if not train.state.final else f"`loraq show {train.id}` says why."
        )
        raise LoraqError(f"{trial} has no adapter to ask: it is {train.state}", do)
    return train
