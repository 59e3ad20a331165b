"""What the slots of one worker have in common; the worker lives in this process and has no server."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from helpers import wait_for
from worker_process import STUB

from gpu_worker import pause
from gpu_worker.admission import Admission, grown
from gpu_worker.gpu import Device
from gpu_worker.main import FIRST_DELAY_S, LAST_DELAY_S, Served
from gpu_worker.pause import FIRST_PAUSE_S
from gpu_worker.pool import TrainerPool
from gpu_worker.serve import Server
from gpu_worker.worker import Worker
from jobqueue.broker import make_app
from jobqueue.job import Claim
from jobqueue.memory import GIB
from jobqueue.settings import Settings

URL = "redis://127.0.0.1:1/0"
SOON_S = 30.0


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    settings = Settings(redis_url=URL, storage=str(tmp_path / "storage"), data_dir=tmp_path, owner="ann")
    made = Worker(Device("cpu", "cpu"), settings, URL, slots=2)
    yield made
    made.leaving.set()


def claim(nonce: str) -> Claim:
    return Claim("batch.1", int(nonce), nonce, {"kind": "train"}, "batch", 0, 60, need_bytes=GIB)


def test_a_job_that_is_claimed_again_before_its_earlier_attempt_has_ended_keeps_its_memory(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = [claim("2"), claim("1")]
    may_end = {"1": threading.Event(), "2": threading.Event()}
    monkeypatch.setattr(worker.store, "claim", lambda *_, **__: claims.pop() if claims else None)
    monkeypatch.setattr(worker, "_run", lambda claim, _: may_end[claim.nonce].wait(SOON_S))
    slots = [threading.Thread(target=worker.work, kwargs={"wait": True}) for _ in may_end]
    for slot in slots:
        slot.start()
    wait_for(lambda: worker.idle_slots == 0, SOON_S, "both attempts run")

    may_end["1"].set()
    wait_for(lambda: worker.idle_slots == 1, SOON_S, "the earlier one has ended")

    assert worker.info()["running"] == ["batch.1"]
    assert worker._admission.budget("2") >= GIB
    may_end["2"].set()
    for slot in slots:
        slot.join(SOON_S)
    assert worker._admission.promised == 0


def test_what_all_slots_meet_at_once_is_one_reason_to_pause(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(pause, "time", SimpleNamespace(monotonic=lambda: now))

    for _ in range(16):
        worker._spoilt("the disk is full")
    now += FIRST_PAUSE_S
    assert worker.well() or worker._storage_watch.problem
    assert not worker.note().startswith("it pauses")

    worker._spoilt("the disk is full")
    now += FIRST_PAUSE_S
    assert worker.note() == "it pauses: the disk is full", "the next time it pauses for longer"


def test_an_idle_slot_goes_on_asking_when_no_process_could_be_started(worker: Worker) -> None:
    asked = threading.Event()
    failures = iter([OSError("out of memory"), RuntimeError("can't start new thread")])

    def tend() -> None:
        if error := next(failures, None):
            raise error

    served = SimpleNamespace(
        app=make_app(URL, 1.0),
        settings=replace(worker.settings, poll_s=0.01),
        leaving=threading.Event(),
        idle_slots=1,
        tend=tend,
        work=lambda **_: asked.set(),
    )
    asking = threading.Thread(target=Server(cast(Worker, served))._ask, daemon=True)
    asking.start()

    assert asked.wait(SOON_S)
    served.leaving.set()
    asking.join(SOON_S)


def test_a_worker_that_cannot_be_started_is_tried_again_and_ends_no_other(tmp_path: Path) -> None:
    served = Served(Device("cpu", "cpu"), [str(tmp_path / "nothing")], {}, tmp_path)
    served.tend(0.0)
    assert served.process is None

    served.command = [sys.executable, "-c", ""]
    served.tend(FIRST_DELAY_S)
    assert served.process is None, "it waits a little"
    served.tend(LAST_DELAY_S)
    assert served.process is not None
    assert served.process.wait(SOON_S) == 0


def test_a_heartbeat_that_broke_off_is_not_the_last(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = threading.Event()
    failures = iter([MemoryError(), RuntimeError("can't start new thread")])

    def heartbeat(*_: object) -> bool:
        if error := next(failures, None):
            raise error
        heard.set()
        return True

    monkeypatch.setattr(worker.store, "heartbeat", heartbeat)
    monkeypatch.setattr(worker, "settings", replace(worker.settings, heartbeat_s=0.01))
    beating = threading.Thread(target=Server(worker)._beat, daemon=True)
    beating.start()

    assert heard.wait(SOON_S)
    wait_for(worker.drained.is_set, SOON_S, "it hears that it is to drain")
    worker.leaving.set()
    beating.join(SOON_S)


def test_a_machine_that_is_renamed_is_drained_by_the_name_that_its_workers_show(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "another")

    assert worker.id.startswith(f"{worker.info()['host']}/cpu#")


def test_a_resting_trainer_waits_for_the_job_that_has_the_whole_card_and_does_not_outlive_its_start(
    tmp_path: Path,
) -> None:
    """With one slot and no spares it was ended between the claim and the take, 40 s before another had started."""
    settings = Settings(redis_url=URL, data_dir=tmp_path, trainer_command=(sys.executable, str(STUB)))
    worker = Worker(Device("cpu", "cpu"), settings, URL)
    usable = worker._watch.health.usable_bytes
    worker.device = Device("gpu", "a GPU of the size of this machine's memory")
    trainer = worker.pool.take("/stub/a")
    worker.pool.give_back(trainer, "/stub/a", clean=True)
    try:
        worker._admission.admit("1", usable, usable)
        worker.pool.tend()
        assert worker.pool.resting == 1, "its context is part of what the job was promised"

        other = worker.pool.take("/stub/b")
        assert worker.pool.resting == 0, "the job may use all of it now"
        worker.pool.give_back(other, "/stub/b", clean=True)
        assert worker.pool.take("/stub/b") is other, "beside a job that still writes its result"
        other.kill()
    finally:
        worker.pool.close()


def test_beside_a_job_one_spare_is_imported_after_the_other(tmp_path: Path) -> None:
    """Sixteen at once took the cores from the jobs that they were to follow."""
    ready = tmp_path / "ready"
    code = f"""
import os, time
while not os.path.exists({str(ready)!r}): time.sleep(0.01)
os.write(int(os.environ["LORAQ_EVENTS_FD"]), b'{{"type": "ready", "versions": {{}}}}\\n')
time.sleep(60)
"""
    pool = TrainerPool({**os.environ}, tmp_path, 0.2, [sys.executable, "-c", code], spares=3, most=lambda: 3)
    at_work = pool.take("/stub/a")
    try:
        pool.tend()
        pool.tend()
        assert pool.resting == 1, "the next waits until this one is ready"
        ready.touch()
        wait_for(lambda: pool.tend() or pool.resting == 3, SOON_S, "one after the other")

        ready.unlink()
        pool.give_back(pool.take("/stub/b"), "/stub/b", clean=False)
        pool.give_back(at_work, "/stub/a", clean=False)
        pool.close()
        pool.tend()
        assert pool.resting == 3, "nobody is disturbed"
    finally:
        at_work.kill()
        pool.close()


def test_a_spare_that_hangs_in_its_import_is_ended_and_given_to_no_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    pool = TrainerPool({**os.environ}, tmp_path, 0.2, command, spares=1, most=lambda: 1)
    try:
        pool.tend()
        pool.tend(import_s=60)
        assert pool.resting == 1, "it may still be at it"
        pool.tend(import_s=0)
        assert pool.resting == 0
        assert "or hung" in caplog.text
    finally:
        pool.close()


@pytest.mark.parametrize("slots", [1, 16])
def test_a_job_that_never_has_enough_ends_though_what_is_usable_varies(slots: int) -> None:
    at_claim, at_failure = int(79.2 * GIB), 80 * GIB
    admission, need = Admission(slots), GIB
    for _attempt in range(15):
        assert need <= at_claim, "it can be claimed again"
        given = admission.admit("1", need, at_claim)
        admission.release("1")
        more = grown(given, at_failure)
        if more is None:
            return
        assert more > need
        need = more
    pytest.fail("it is tried again without end")
