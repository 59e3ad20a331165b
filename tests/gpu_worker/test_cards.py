"""A real worker of two GPUs, whose NVML is simulated: cards that fail, are mended, and are used by others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from helpers import wait_for
from worker_process import ROOT, START_S, Site, succeeded_once

from jobqueue.broker import make_app, send_tokens
from jobqueue.job import FailureReason, Job, JobState, WorkerInfo
from jobqueue.memory import GIB

TOTAL = 24 * GIB


class Cards:
    """What NVML says of two GPUs, until it is changed."""

    def __init__(self, here: Site) -> None:
        self.here, self.folder = here, here.folder / "nvml"
        self.folder.mkdir()
        for index in (0, 1):
            self.set(index)

    def set(self, index: int, **state: object) -> None:
        """Of a well and empty card but for this."""
        file = self.folder / f"{index}.json"
        new = file.with_suffix(".new")
        new.write_text(json.dumps({"total": TOTAL, "free": TOTAL, **state}))
        new.rename(file)

    def worker(self, index: int) -> WorkerInfo:
        return next(w for w in self.here.store.workers() if w.id.endswith(f"gpu{index}"))

    def note(self, index: int, text: str) -> None:
        """Waits until that worker says so."""
        wait_for(lambda: text in self.worker(index).note, START_S, f"gpu{index} says {text!r}")

    def well(self, index: int) -> None:
        wait_for(lambda: self.worker(index).note == "", START_S, f"gpu{index} is well")

    def on(self, job_id: str) -> int:
        """The card that the job runs on."""
        return int(self.here.store.job(job_id).worker[-1])


@pytest.fixture(scope="module")
def here(one_site: Site) -> Site:
    return one_site


@pytest.fixture(scope="module")
def started(here: Site) -> Cards:
    cards = Cards(here)
    path = os.pathsep.join([str(ROOT / "tests" / "fake_nvml"), str(ROOT)])
    here.start("--gpu", "0", "--gpu", "1", PYTHONPATH=path, FAKE_NVML=cards.folder)
    wait_for(lambda: len(here.store.workers()) == 3, START_S, "two GPUs and control")
    return cards


@pytest.fixture
def cards(started: Cards) -> Cards:
    for index in (0, 1):
        started.set(index)
        started.well(index)
    return started


def run_on(cards: Cards, job_id: str, index: int, words: str, **changes: object) -> Job:
    """Begins a job on that card: the other one is drained meanwhile."""
    other = cards.worker(1 - index).id
    cards.here.store.mark("drained", other, True)
    cards.here.submit(job_id, words, **changes)
    cards.here.beating(job_id)
    cards.here.store.mark("drained", other, False)
    cards.well(1 - index)
    return cards.here.store.job(job_id)


def test_a_job_on_a_card_that_is_lost_goes_on_elsewhere_from_its_checkpoint_at_no_cost(cards: Cards) -> None:
    here = cards.here
    job = run_on(cards, "lost.1", 0, "save/deaf/sleep:4", submission="s1")
    wait_for(lambda: here.storage.checkpoints("lost.1", job.batch, "s1"), START_S, "there is a checkpoint")
    cards.set(0, error="GPU_IS_LOST")

    cards.note(0, "sick: it does not answer since")
    wait_for(lambda: here.store.job("lost.1").attempt == 2, START_S, "it is claimed again")
    assert cards.on("lost.1") == 1
    job = here.ended("lost.1")

    assert succeeded_once(job)
    assert (job.failures, job.history[0]["reason"]) == (0, FailureReason.DEVICE)
    assert job.history[0]["message"].endswith("GPU is lost")
    assert job.outcome["resumed"]
    assert len(here.trainers_in_turn("lost.1")) == 2
    cards.set(0)
    cards.well(0)
    run_on(cards, "back.1", 0, "sleep:0.5")
    assert succeeded_once(here.ended("back.1")), "the card takes jobs again"


def test_a_trainer_that_dies_of_an_ecc_error_is_not_to_blame(cards: Cards) -> None:
    here = cards.here
    run_on(cards, "ecc.1", 1, "await:ecc/exit:1")
    cards.set(1, uncorrected=1, recovery=0)
    (here.beats / "ecc").write_text("")

    wait_for(lambda: here.store.job("ecc.1").history, START_S, "the first attempt ends")
    here.store.cancel(["ecc.1"])

    job = here.store.job("ecc.1")
    assert (job.failures, job.history[0]["reason"]) == (0, "device")
    assert "ECC error that could not be corrected" in job.history[0]["message"]


def test_memory_of_a_foreign_process_makes_the_card_smaller_while_the_worker_runs_and_is_named(cards: Cards) -> None:
    """clearml-agent#71: a job was taken though someone else used the GPU."""
    here = cards.here
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        for index in (0, 1):
            cards.set(index, free=TOTAL - 20 * GIB, held={other.pid: 20 * GIB})
            cards.note(index, f"20.0 GiB held by other processes (pid {other.pid} {psutil.Process(other.pid).name()})")
        here.submit("large.1", "sleep:0.1", need=12 * GIB, queue="gpu16")
        here.submit("small.1", "sleep:0.1")

        assert succeeded_once(here.ended("small.1")), "what fits is taken"
        assert here.store.job("large.1").state is JobState.QUEUED
        assert (cards.worker(0).usable_bytes < 4 * GIB, cards.worker(0).takes_jobs) == (True, True)
    finally:
        other.kill()
        other.wait()
    for index in (0, 1):
        cards.set(index)
        cards.well(index)
    assert succeeded_once(here.ended("large.1")), "the memory is free again, and nobody had to say so"


def test_a_job_whose_memory_others_took_keeps_its_micro_batch(cards: Cards) -> None:
    here = cards.here
    run_on(cards, "taken.1", 0, "await:taken/fail:out_of_memory", need=8 * GIB)
    cards.set(0, free=2 * GIB, held={os.getpid(): TOTAL - 2 * GIB})
    cards.set(1, free=2 * GIB, held={os.getpid(): TOTAL - 2 * GIB})
    (here.beats / "taken").write_text("")

    wait_for(lambda: here.store.job("taken.1").history, START_S, "the first attempt ends")
    here.store.cancel(["taken.1"])

    job = here.store.job("taken.1")
    assert (job.failures, job.rung, job.history[0]["reason"]) == (0, 0, "device")
    assert f"22.0 GiB held by other processes (pid {os.getpid()} " in job.history[0]["message"]
    for index in (0, 1):
        cards.note(index, "22.0 GiB held by other processes")  # not later, in the next test


def test_memory_of_our_own_trainer_is_not_foreign_until_it_outlives_its_process(cards: Cards) -> None:
    here = cards.here
    run_on(cards, "held.1", 0, "deaf/child/sleep:60")
    pid = int(here.lines("held.1")[-1].split()[0])
    cards.set(0, free=TOTAL - 9 * GIB, held={pid: 9 * GIB})
    wait_for(lambda: cards.worker(0).usable_bytes < TOTAL, START_S, "the worker has looked")
    assert cards.worker(0).usable_bytes > 23 * GIB
    assert cards.worker(0).note == ""
    here.store.cancel(["held.1"])

    job = here.ended("held.1")

    assert not psutil.pid_exists(pid)
    assert (job.state, job.message) == (
        JobState.CANCELLED,
        "on request; 9.0 GiB of the GPU's memory did not come back",
    )
    cards.note(0, f"9.0 GiB held by other processes (pid {pid} (ended))")


def test_a_cancel_is_confirmed_when_the_memory_is_free_and_not_before(cards: Cards) -> None:
    here = cards.here
    run_on(cards, "free.1", 1, "sleep:60")
    trainer = psutil.Process(int(here.lines("free.1")[-1].split()[0]))
    cards.set(1, free=TOTAL - 9 * GIB, held={trainer.pid: 9 * GIB})
    wait_for(lambda: cards.worker(1).usable_bytes, START_S, "the worker has looked")
    here.store.cancel(["free.1"])
    wait_for(lambda: not trainer.is_running(), START_S, "the trainer is gone")
    at_its_end = here.store.job("free.1").state
    cards.set(1)

    job = here.ended("free.1")

    assert at_its_end is JobState.RUNNING
    assert (job.state, job.message) == (JobState.CANCELLED, "on request")


def test_how_busy_a_card_is_is_told_as_far_as_the_card_tells_it(cards: Cards) -> None:
    cards.set(0, free=TOTAL - GIB // 2, busy=97, temperature=62, power=412_300, power_limit=700_000)
    cards.set(1, reserved=GIB // 4, free=TOTAL - GIB // 2)

    wait_for(lambda: cards.worker(0).utilization == 97 and cards.worker(1).used_bytes, START_S, "both have looked")
    told, silent = cards.worker(0), cards.worker(1)
    assert (told.total_bytes, told.used_bytes) == (TOTAL, GIB // 2)
    assert (told.temperature_c, told.power_w, told.power_limit_w) == (62, 412.3, 700.0)
    assert silent.used_bytes == GIB // 4, "what the driver keeps is nobody's"
    assert (silent.utilization, silent.temperature_c, silent.power_w) == (None, None, None)
    assert (silent.note, silent.promised_bytes) == ("", 0)


def test_a_running_job_shows_what_it_was_promised_and_how_fast_it_goes(cards: Cards) -> None:
    here = cards.here
    run_on(cards, "shown.1", 0, "sleep:60", need=2 * GIB)

    wait_for(lambda: here.store.job("shown.1").progress.get("seconds_per_step"), START_S, "two steps were seen")
    seen = here.store.overview("", "", 10)
    job = next(job for job in seen.running if job.id == "shown.1")
    assert 0.04 < job.progress["seconds_per_step"] < 1, "a step takes 0.05 s, on an idle machine"
    assert job.progress["promised_bytes"] >= 2 * GIB
    wait_for(lambda: cards.worker(0).promised_bytes == job.progress["promised_bytes"], START_S, "the worker says so")
    assert [worker.running for worker in seen.workers if worker.id == job.worker] == [("shown.1",)]
    here.store.cancel(["shown.1"])
    here.ended("shown.1")


def test_an_xid_that_is_the_cards_fault_stops_the_card_and_one_of_a_program_does_not(cards: Cards) -> None:
    """The last test here: a real worker looks at such a card every 15 s only."""
    cards.set(0, xids=[13, 31, 43, 79])

    cards.note(0, "sick: Xid 79 at ")
    assert "fallen off the bus; it needs a reset" in cards.worker(0).note
    assert not cards.worker(0).takes_jobs
    cards.here.submit("xid.1", "sleep:0.1")
    assert cards.here.ended("xid.1").worker.endswith("gpu1")

    sound = cards.worker(1).id
    cards.here.store.mark("drained", sound, True)
    wait_for(lambda: _stays(cards, "gpu16"), START_S, "neither of them takes a wake-up that it cannot use")
    cards.here.store.mark("drained", sound, False)
    wait_for(lambda: cards.here.store.tokens("loraq.gpu16") == 0, START_S, "the sound one takes wake-ups again")


def _stays(cards: Cards, memory_class: str) -> bool:
    """Whether a wake-up is still there after a time in which a listening worker takes dozens."""
    send_tokens(make_app(cards.here.store.url, 5.0), [memory_class])
    time.sleep(1)
    return cards.here.store.tokens(f"loraq.{memory_class}") > 0
