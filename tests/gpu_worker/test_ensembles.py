"""The merge of an ensemble on a real worker: its members' adapters are at hand, or it says which are not."""

from __future__ import annotations

from typing import Any

from helpers import new_job, submit
from worker_process import Site

from jobqueue.ensemble_spec import Members
from jobqueue.job import FailureReason, Job, JobState
from jobqueue.job_spec import EvaluateSpec
from jobqueue.spec import EvaluationSpec, ResourcesSpec


def merged(here: Site, **changes: Any) -> Job:
    """The end of a job that merges the adapters of a.1 and b.1."""
    spec = EvaluateSpec(
        base_model="/stub/x",
        method="lora",
        adapter_job=None,
        members=Members(name="top", trains=("a.1", "b.1"), method="cat", **changes),
        load_in_4bit=False,
        max_seq_length=128,
        evaluation=EvaluationSpec(source="nobody/reads-it"),
        resources=ResourcesSpec(),
    )
    submit(here.store, new_job("c.top", kind="evaluate", spec=spec.model_dump_json()))
    return here.ended("c.top")


def test_the_adapters_of_the_members_come_in_their_order_and_what_is_made_is_kept(here: Site) -> None:
    here.start()
    for name in ("b.1", "a.1"):
        here.submit(name, "x")
        here.ended(name)
    job = merged(here)
    assert job.outcome["members"] == ["a.1", "b.1"]
    assert here.storage.read_text(f"{job.outcome['folder']}/adapter/adapter_model.txt") == "c.top"


def test_too_few_that_succeeded_are_no_ensemble(here: Site) -> None:
    here.start()
    here.submit("a.1", "x")
    here.submit("b.1", "fail:bad_data")
    here.ended("a.1")
    here.ended("b.1")
    job = merged(here, best=2)
    assert (job.state, job.reason) == (JobState.FAILED, FailureReason.BAD_SPEC)
    assert job.message == "top: 1 of its trials have succeeded, and 2 are to be members"
