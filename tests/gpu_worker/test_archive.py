"""A control worker moves old batches to the storage, and a worker finds there what a job needs of them."""

from __future__ import annotations

import pytest
from helpers import wait_for
from worker_process import START_S, Site

from jobqueue.asking import question
from jobqueue.errors import ArchivedError
from jobqueue.job import JobState
from jobqueue.service import Client

DAY_S = 24 * 3600


def test_a_control_worker_archives_what_ended_long_ago_and_its_adapter_is_found_all_the_same(here: Site) -> None:
    client = Client(here.settings)
    here.start("--cpu", "--no-control")
    here.submit("b.1", "say:trained")
    here.ended("b.1")
    jobs = client.jobs("b")
    asked_before = question(here.store, "b/1", ["Which drug?"], "ann", {})  # and waits, so to speak, for a worker
    here.submit("c.1", "await:go")
    wait_for(lambda: here.lines("c.1"), START_S, "another batch is at work")

    control = here.start("--control-only", LORAQ_ARCHIVE_DAYS=0.1 / DAY_S)

    wait_for(lambda: here.store.batch_names() == ["c"], START_S, "it is archived")
    assert client.jobs("b") == jobs
    with pytest.raises(ArchivedError):
        client.ask("b/1", ["Which drug?"])
    here.store.ask(asked_before)
    (here.beats / "go").touch()
    job = here.ended(asked_before.id)
    assert (job.state, job.message) == (JobState.SUCCEEDED, "")
    wait_for(lambda: here.store.batch_names() == [], START_S, "the other one has ended, and is archived")
    assert control.stop() == 0
