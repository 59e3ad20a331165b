"""Several jobs on one GPU: admission by memory, spare trainers, and what happens when an estimate was wrong.

The card's NVML is simulated; worker and server are real.
"""

from __future__ import annotations

import contextlib
import os

import psutil
import pytest
from helpers import SUCCEEDED, claim, wait_for
from test_cards import TOTAL, Cards
from worker_process import ROOT, START_S, STUB, Site, succeeded_once

from jobqueue.job import FailureReason, JobState
from jobqueue.memory import CONTEXT, GIB, kind_of, memory_class

SLOTS = 4


@pytest.fixture(scope="module")
def here(one_site: Site) -> Site:
    """With a worker of one GPU."""
    cards = Cards(one_site)
    path = os.pathsep.join([str(ROOT / "tests" / "fake_nvml"), str(ROOT)])
    options = ("--gpu", "0", "--slots", str(SLOTS), "--spares", "1")
    one_site.start(*options, PYTHONPATH=path, FAKE_NVML=cards.folder)
    wait_for(lambda: len(one_site.store.workers()) == 2, START_S, "a GPU and control")
    return one_site


def submit(here: Site, job_id: str, words: str, gib: float) -> None:
    need = int(gib * GIB)
    here.submit(job_id, words, need=need, queue=memory_class(need))


def most_at_once(here: Site, jobs: list[str]) -> int:
    """How many of the jobs' trainers were at work at the same time, by their beats."""
    spans = []
    for job in jobs:
        beats = [float(at) for _, at, _ in map(str.split, here.lines(job))]
        spans.append((min(beats), max(beats)))
    return max(sum(begin <= start <= end for begin, end in spans) for start, _ in spans)


def trainers(here: Site) -> list[int]:
    """The trainers, at work or not."""
    found = []
    for process in here.left(trainers_only=True):
        with contextlib.suppress(psutil.Error):  # it has ended since
            command = process.cmdline()
            if command[-1:] == [str(STUB)] and "guardian" not in " ".join(command):
                found.append(process.pid)
    return found


def test_a_spare_stands_ready_takes_the_next_job_and_is_replaced(here: Site) -> None:
    spare = wait_for(lambda: trainers(here), START_S, "there is a trainer before there is a job")

    submit(here, "ready.1", "sleep:0.3", gib=2)

    assert succeeded_once(here.ended("ready.1"))
    assert here.trainers_in_turn("ready.1")[0] in spare
    wait_for(lambda: len(trainers(here)) >= 2, START_S, "another stands ready beside the one that rests")


def test_as_many_jobs_run_side_by_side_as_there_are_slots(here: Site) -> None:
    jobs = [f"side{number}.1" for number in range(SLOTS)]
    for job in jobs:
        submit(here, job, "sleep:0.2/await:go/sleep:0.2", gib=5)

    wait_for(lambda: all(here.lines(job) for job in jobs), START_S, "all of them are at work")
    (here.beats / "go").write_text("")

    assert all(succeeded_once(here.ended(job)) for job in jobs)


def test_what_the_jobs_were_promised_never_exceeds_the_card(here: Site) -> None:
    jobs = [f"half{number}.1" for number in range(5)]
    for job in jobs:
        submit(here, job, "sleep:0.5", gib=11)

    assert all(succeeded_once(here.ended(job)) for job in jobs)
    assert most_at_once(here, jobs) <= 2


def test_a_job_that_holds_itself_to_less_makes_room_for_others(here: Site) -> None:
    submit(here, "first.1", "sleep:0.2/await:lower/budget:5/await:second/sleep:0.1", gib=20)
    wait_for(lambda: here.lines("first.1"), START_S, "the first is at work")
    submit(here, "second.1", "sleep:0.2", gib=10)
    (here.beats / "lower").write_text("")

    assert succeeded_once(here.ended("second.1")), "beside the first"
    assert here.store.job("first.1").state is JobState.RUNNING
    (here.beats / "second").write_text("")
    assert succeeded_once(here.ended("first.1"))


def test_a_job_that_ran_out_of_what_it_was_given_is_given_more_until_it_has_the_card(here: Site) -> None:
    submit(here, "wrong.1", "oom:0", gib=1)

    job = here.ended("wrong.1")

    assert (job.state, job.reason) == (JobState.FAILED, FailureReason.OUT_OF_MEMORY)
    assert "nothing smaller is left" in job.message
    assert "is given" in job.history[1]["message"], "once the smallest split had failed"
    assert job.need_bytes > 0.95 * TOTAL
    assert job.rung == 1, "no split was tried twice with the same memory"
    assert job.failures == 1


def test_a_job_that_had_this_card_to_itself_goes_on_on_a_larger_one(here: Site) -> None:
    info = {
        "host": "b",
        "device": "H100",
        "uuid": "GPU-b",
        "usable_bytes": 78 * GIB,
        "slots": 1,
        "running": [],
        "note": "",
    }
    here.store.heartbeat("b/gpu0", "gpu", {**info, "every_s": 60})
    try:
        submit(here, "large.1", "oom:0", gib=1)
        wait_for(lambda: here.store.job("large.1").need_bytes > TOTAL, START_S, "this card is too small")

        taken = claim(here.store, "b/gpu0", free=78 * GIB, queues=["gpu48", "gpu80"])
        assert taken is not None
        assert taken.job_id == "large.1"
        here.store.settle(taken, SUCCEEDED)
    finally:
        here.store.leave("b/gpu0")


def test_a_job_whose_estimate_is_too_small_gets_what_it_needs(here: Site) -> None:
    submit(here, "small.1", "least:12", gib=2)

    job = here.ended("small.1")

    assert succeeded_once(job)
    assert job.need_bytes > 8 * GIB, "its estimate grew"


def test_what_a_job_was_measured_to_take_corrects_the_estimate_for_its_kind(here: Site) -> None:
    for job_id in ("learn.1", "again.1"):  # the second one's estimate is corrected by what the first one took
        submit(here, job_id, "took:0.5", gib=2)

        job = here.ended(job_id)

        assert here.store.correction(kind_of(job.spec)) == pytest.approx((0.5 * GIB + CONTEXT) / GIB)


def test_a_spare_that_was_killed_does_not_get_a_job_and_is_replaced(here: Site) -> None:
    killed = wait_for(lambda: trainers(here), START_S, "there are trainers")
    for pid in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()

    submit(here, "after.1", "sleep:0.2", gib=2)
    assert succeeded_once(here.ended("after.1"))
    assert here.store.job("after.1").failures == 0
    wait_for(lambda: set(trainers(here)) - set(killed), START_S, "a new one stands ready")


def test_a_drained_worker_keeps_no_trainer(here: Site) -> None:
    gpu = next(worker.id for worker in here.store.workers() if worker.id.endswith("gpu0"))
    here.store.mark("drained", gpu, True)
    wait_for(lambda: not trainers(here), START_S, "none is left")
    here.store.mark("drained", gpu, False)
    wait_for(lambda: trainers(here), START_S, "one stands ready again")
