"""A storage that is full, read-only, gone, slow or hangs, under a real worker in mid-job. Mounts need root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import new_job, submit, wait_for
from worker_process import LEASE_S, ROOT, START_S, Site, succeeded_once

from gpu_worker.checkpoints import CheckpointKeeper
from gpu_worker.protocol import Checkpoint
from jobqueue.job import Claim, FailureReason, JobState
from jobqueue.storage import Storage

SLOW = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "slow_fs"), str(ROOT)])}


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"this test needs root and mounts: {done.stderr}"


class Disk:
    """A small disk that is mounted where the storage is."""

    def __init__(self, here: Site) -> None:
        self._disk, self.folder = here.folder / "disk", Path(here.settings.storage_url)
        for folder in (self._disk, self.folder):
            folder.mkdir()
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self._disk))
        mount("--bind", str(self._disk), str(self.folder))

    def harm(self, how: str) -> None:
        if how == "full":
            with (self._disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        elif how == "read-only":
            mount("-o", "remount,ro", str(self._disk))
            mount("-o", "remount,bind,ro", str(self.folder))
        else:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def mend(self, how: str) -> None:
        if how == "full":
            (self._disk / "filler").unlink()
        elif how == "read-only":
            mount("-o", "remount,rw", str(self._disk))
            mount("-o", "remount,bind,rw", str(self.folder))
        else:
            mount("--bind", str(self._disk), str(self.folder))

    def close(self) -> None:
        for folder in (self.folder, self._disk):
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


@pytest.fixture
def disk(here: Site) -> Iterator[Disk]:
    opened = Disk(here)
    yield opened
    here.close()
    opened.close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("full", "No space left on device"),
        ("read-only", "Read-only file system"),
        ("gone", "it is not mounted"),
    ],
)
def test_a_job_whose_storage_fails_goes_on_from_its_newest_checkpoint_when_it_is_back(
    here: Site, disk: Disk, how: str, said: str
) -> None:
    here.start()
    here.submit("b.1", "save/sleep:0.5/await:harm/sleep:1/await:go", submission="s1")
    wait_for(lambda: here.storage.checkpoints("b.1", "b", "s1"), START_S, "there is a checkpoint")
    disk.harm(how)
    (here.beats / "harm").write_text("")
    wait_for(lambda: any("could not be kept" in e.text for e in here.store.events("b.1", "0", 0)), START_S, "a word")
    (here.beats / "go").write_text("")
    wait_for(lambda: here.store.job("b.1").attempt and here.store.job("b.1").history, START_S, "the attempt ends")

    job = here.store.job("b.1")
    assert (job.state, job.reason) == (JobState.QUEUED, FailureReason.STORAGE)
    assert said in job.message
    here.store._redis.zadd("{loraq}:delayed", {"b.1": 0}, xx=True)  # as if its delay were over
    wait_for(lambda: said in _note(here), START_S, "the worker says so")
    here.submit("other.1", "sleep:0.1")
    assert here.store.job("other.1").attempt == 0

    disk.mend(how)
    assert here.storage.published("b.1", "b") is None, "nothing half-written is visible"
    job = here.ended("b.1")

    assert succeeded_once(job)
    assert (job.failures, job.attempt) == (1, 2), "none of its attempts was thrown at a storage that is gone"
    assert job.outcome["resumed"]
    assert succeeded_once(here.ended("other.1"))


def test_a_checkpoint_whose_files_were_lost_is_not_gone_on_from(here: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    for step in (10, 20):
        (made / "step.txt").write_text(str(step))
        folder = f"batches/b/b.1/9-ff/checkpoints/checkpoint-{step}"
        here.storage.publish(made, folder, {"submission": "s1", "step": step})
    Path(here.storage.address(f"{folder}/step.txt")).write_text("")  # as after a power cut
    here.start()
    here.submit("b.1", "sleep:1", submission="s1")

    assert here.ended("b.1").outcome["resumed"].endswith("checkpoint-10")


def test_a_checkpoint_whose_files_were_lost_does_not_push_out_those_that_follow(here: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "step.txt").write_text("50")
    for step in (50, 60):
        folder = f"batches/b/b.1/9-ff/checkpoints/checkpoint-{step}"
        here.storage.publish(made, folder, {"submission": "s1", "step": step})
        Path(here.storage.address(f"{folder}/step.txt")).write_text("")
    here.start()
    here.submit("b.1", "save/sleep:60", submission="s1")
    here.beating("b.1")

    def steps() -> list[int]:
        return [int(kept.manifest["step"]) for kept in here.storage.checkpoints("b.1", "b", "s1")]

    wait_for(lambda: steps()[2:] == [20, 10], START_S, "the new ones are kept")


def test_a_copy_that_was_given_up_removes_nothing_that_the_next_attempt_may_read(
    here: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, latest = tmp_path / "made", tmp_path / "checkpoint-30"
    for folder in (made, latest):
        folder.mkdir()
        (folder / "step.txt").write_text("0")
    for step in (10, 20):
        here.storage.publish(made, f"batches/b/b.1/1-ff/checkpoints/checkpoint-{step}", {"step": step})
    go_on, publish = threading.Event(), here.storage.publish

    def hang(*words: Any) -> Mapping[str, Any]:
        assert go_on.wait(START_S)
        return publish(*words)

    monkeypatch.setattr(here.storage, "publish", hang)
    keeper = CheckpointKeeper(here.storage, Claim("b.1", 1, "ff", {"kind": "train"}, "b", 0, LEASE_S), 2)
    keeper.take(Checkpoint(30, str(latest)))
    keeper.give_up()
    go_on.set()
    keeper.finish()

    assert [kept.manifest["step"] for kept in here.storage.checkpoints("b.1", "b", "")] == [30, 20, 10]


def test_a_checkpoint_for_which_the_machine_has_no_thread_is_said_and_the_next_one_is_kept(
    here: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    keeper = CheckpointKeeper(here.storage, Claim("b.1", 1, "ff", {"kind": "train"}, "b", 0, LEASE_S), 2)
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "step.txt").write_text("0")
        with monkeypatch.context() as scarce:
            if step == 10:
                scarce.setattr(threading.Thread, "start", no_thread)
            keeper.take(Checkpoint(step, str(folder)))
    keeper.finish()

    assert keeper.said.get_nowait() == ("loraq: the checkpoint of step 10 could not be kept: can't start new thread")
    assert [kept.manifest["step"] for kept in here.storage.checkpoints("b.1", "b", "")] == [20]
    assert not (tmp_path / "checkpoint-10").exists()


@pytest.fixture
def slow(here: Site) -> Path:
    folder = here.folder / "slow"
    folder.mkdir()
    here.storage = Storage(str(folder))
    return folder


def test_slow_writes_cost_no_lease(here: Site, slow: Path) -> None:
    (slow / "slow").write_text("")
    here.start(**SLOW, LORAQ_STORAGE=f"slow://{slow}")
    here.submit("b.1", "save/sleep:2")

    job = here.ended("b.1")

    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (1, 0)
    assert job.ended_at - job.claimed_at > LEASE_S, "it took longer than a lease"


def test_a_trainer_stays_for_the_next_job_while_its_result_is_written(here: Site, slow: Path) -> None:
    here.start(**SLOW, LORAQ_STORAGE=f"slow://{slow}")
    here.submit("b.1", "await:go")
    wait_for(lambda: here.store.job("b.1").state is JobState.RUNNING, START_S, "it runs")
    (slow / "slow").write_text("")
    here.submit("c.1", "await:go")
    (here.beats / "go").write_text("")

    assert here.ended("b.1").outcome["pid"] == here.ended("c.1").outcome["pid"]


def test_a_write_that_hangs_is_given_up_while_the_lease_is_renewed(here: Site, slow: Path) -> None:
    here.start(**SLOW, LORAQ_STORAGE=f"slow://{slow}", LORAQ_STORAGE_TIMEOUT_S=1.5 * LEASE_S)
    here.submit("b.1", "await:go", submission="s1")
    here.beating("b.1")
    (slow / "hang").write_text("")
    (here.beats / "go").write_text("")

    wait_for(lambda: here.store.job("b.1").history, START_S, "the attempt ends")
    job = here.store.job("b.1")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.STORAGE, 1)
    assert job.message == "could not write the result: the storage hangs"
    (slow / "hang").unlink()
    assert succeeded_once(here.ended("b.1"))


def test_a_cancel_and_a_stop_do_not_wait_for_a_storage_that_hangs(here: Site, slow: Path) -> None:
    worker = here.start(**SLOW, LORAQ_STORAGE=f"slow://{slow}")
    here.submit("b.1", "await:go")
    here.beating("b.1")
    (slow / "hang").write_text("")
    (here.beats / "go").write_text("")
    here.store.cancel(["b.1"])

    job = here.ended("b.1", 10)
    assert (job.state, job.message) == (JobState.CANCELLED, "on request")

    (slow / "hang").unlink()
    here.submit("c.1", "save/sleep:60")
    here.beating("c.1")
    (slow / "hang").write_text("")
    wait_for(lambda: len(here.lines("c.1")) > 15, START_S, "a checkpoint is due, and hangs")
    assert worker.stop() == 0
    job = here.store.job("c.1")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)
    assert here.left() == []


def test_a_stop_does_not_wait_for_what_a_job_still_reads(here: Site, slow: Path) -> None:
    worker = here.start(**SLOW, LORAQ_STORAGE=f"slow://{slow}")
    here.submit("a.1", "sleep:0.1")
    assert succeeded_once(here.ended("a.1"))
    checkpoint = slow / "batches/b/b.1/9-ff/checkpoints/checkpoint-10"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (slow / "hang").write_text("")
    here.submit("b.1", "sleep:60")
    wait_for(lambda: here.store.job("b.1").state is JobState.RUNNING, START_S, "it is claimed, and reads")

    assert worker.stop() == 0
    job = here.store.job("b.1")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)


def test_a_stop_does_not_wait_for_a_result_that_cannot_be_written(here: Site, slow: Path) -> None:
    worker = here.start(**SLOW, LORAQ_STORAGE=f"slow://{slow}")
    here.submit("b.1", "save/sleep:0.6/await:go/say:done", submission="s1")
    wait_for(lambda: here.storage.checkpoints("b.1", "b", "s1"), START_S, "there is a checkpoint")
    (slow / "hang").write_text("")
    (here.beats / "go").write_text("")
    wait_for(lambda: "done" in [e.text for e in here.store.events("b.1", "0", 0)], START_S, "it has a result")

    assert worker.stop() == 0
    job = here.store.job("b.1")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)
    assert job.message == "the worker was told to stop: could not write the result: the storage hangs"
    (slow / "hang").unlink()
    here.start(**SLOW, LORAQ_STORAGE=f"slow://{slow}")
    job = here.ended("b.1")
    assert succeeded_once(job)
    assert job.outcome["resumed"]


def test_a_stop_does_not_wait_for_a_report_that_cannot_be_written(here: Site, slow: Path) -> None:
    worker = here.start("--control-only", **SLOW, LORAQ_STORAGE=f"slow://{slow}")
    wait_for(lambda: not _note(here, "control") if here.store.workers() else False, START_S, "it has tried its storage")
    (slow / "hang").write_text("")
    spec = {"kind": "report", "batch": "b"}
    submit(here.store, new_job("b.report", kind="report", spec=spec, device="control", queue="control", need=0))
    wait_for(lambda: here.store.job("b.report").state is JobState.RUNNING, START_S, "it is claimed, and writes")

    assert worker.stop() == 0
    job = here.store.job("b.report")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)


def _note(here: Site, worker: str = "cpu") -> str:
    return next(w.note for w in here.store.workers() if w.id.endswith(f"/{worker}"))
