"""Trainers as clients of an MPS daemon. It is simulated (tests/fake_mps), as NVML is; worker and server are real."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import wait_for
from test_cards import Cards
from worker_process import ROOT, START_S, Site, Worker, gone, succeeded_once

from gpu_worker.gpu import Device
from gpu_worker.main import slots_for
from gpu_worker.mps import CONTROL, Mps, mps_of
from gpu_worker.trainer_process import MPS_PIPES
from jobqueue.errors import MachineError
from jobqueue.job import FailureReason, JobState

FAKE = ROOT / "tests" / "fake_mps"
UUID = "GPU-fa4e0000-0000-0000-0000-000000000000"


class Gpu:
    """A site with a worker of one GPU, and what its MPS daemons have noted."""

    def __init__(self, here: Site, **environment: object) -> None:
        self.here, self.folder = here, here.folder / "mps"
        self.folder.mkdir()
        self._environment = {
            "PATH": f"{FAKE}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "fake_nvml"), str(ROOT)]),
            "FAKE_NVML": Cards(here).folder,
            "FAKE_MPS": self.folder,
            **environment,
        }
        self.worker = self.start("mps")

    def start(self, share: str) -> Worker:
        options = ("--gpu", "0", "--slots", "3", "--spares", "0", "--share", share)
        started = self.here.start(*options, **self._environment)
        wait_for(lambda: len(self.here.store.workers()) == 2, START_S, "a GPU and control")
        return started

    def noted(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def daemon(self) -> psutil.Process:
        return psutil.Process(self.noted("daemons")[-1]["pid"])

    @property
    def share(self) -> str:
        return next(w.share for w in self.here.store.workers() if w.id.endswith("gpu0"))

    def pipes_of(self, job_id: str) -> str:
        """Where the trainer that is at work on the job looks for its daemon."""
        return psutil.Process(self.here.beating(job_id)).environ()[MPS_PIPES]

    def lets(self, *words: str) -> None:
        for word in words:
            (self.here.beats / word).write_text("")


@pytest.fixture(scope="module")
def gpu(one_site: Site) -> Gpu:
    return Gpu(one_site)


def test_the_daemon_sees_the_gpu_by_its_uuid_and_trainers_are_its_clients(gpu: Gpu) -> None:
    gpu.here.submit("client.1", "await:client")
    (noted,) = gpu.noted("daemons")

    assert gpu.pipes_of("client.1") == noted["pipes"]
    assert noted["visible"] == UUID
    assert len(f"{noted['pipes']}/control_privileged") < 108, "the longest path of a socket"
    assert Path(noted["logs"]).is_relative_to(gpu.here.settings.data_dir)
    assert gpu.share == "mps"
    gpu.lets("client")
    assert succeeded_once(gpu.here.ended("client.1"))


def test_a_fault_that_takes_all_clients_down_costs_only_the_job_that_does_it_again(gpu: Gpu) -> None:
    here, innocent = gpu.here, ["fine1.1", "fine2.1"]
    for job in innocent:
        here.submit(job, "sleep:0.2/await:end")
    here.submit("poison.1", "await:fault/fault")
    for job in (*innocent, "poison.1"):
        here.beating(job)
    gpu.lets("fault")

    for job in innocent:
        wait_for(lambda job=job: here.store.job(job).attempt == 2, START_S, "it goes on")  # type: ignore[misc]
        assert not os.path.exists(gpu.pipes_of(job)), "in a context of its own"
    poison = here.ended("poison.1")
    assert (poison.state, poison.reason, poison.failures) == (JobState.FAILED, FailureReason.INTERNAL, 2)
    assert [end["reason"] for end in poison.history] == ["device", "internal", "internal"], "alone it paid"
    gpu.lets("end")
    for job in map(here.ended, innocent):
        assert succeeded_once(job)
        assert ([end["reason"] for end in job.history], job.failures) == (["device", ""], 0)

    here.submit("later.1", "await:later")
    assert gpu.pipes_of("later.1") == gpu.noted("daemons")[-1]["pipes"], "who has never failed is a client again"
    gpu.lets("later")
    assert succeeded_once(here.ended("later.1"))


def test_a_job_that_fails_with_nobody_beside_it_pays(gpu: Gpu) -> None:
    gpu.here.submit("alone.1", "fault")

    job = gpu.here.ended("alone.1")

    assert (job.state, job.attempt, job.failures) == (JobState.FAILED, 2, 2)


def test_a_client_is_taken_from_its_server_before_it_is_killed(gpu: Gpu) -> None:
    gpu.here.submit("cancel.1", "deaf/await:never")
    trainer = gpu.here.beating("cancel.1")
    gpu.here.store.cancel(["cancel.1"])

    assert gpu.here.ended("cancel.1").state is JobState.CANCELLED
    server = gpu.noted("daemons")[-1]["server"]
    assert {"server": server, "client": trainer} in gpu.noted("terminated")


def test_a_daemon_that_dies_costs_no_job_and_is_started_again(gpu: Gpu) -> None:
    before = len(gpu.noted("daemons"))
    gpu.here.submit("under.1", "sleep:0.2/await:under")
    gpu.here.beating("under.1")
    server = psutil.Process(gpu.noted("daemons")[-1]["server"])
    gpu.daemon.kill()

    wait_for(lambda: gpu.here.store.job("under.1").attempt == 2, START_S, "it goes on")
    assert gone([server]), "no server is left without its daemon"
    wait_for(lambda: len(gpu.noted("daemons")) == before + 1, START_S, "another daemon")
    wait_for(lambda: gpu.share == "mps", START_S, "new trainers are its clients")
    gpu.lets("under")
    job = gpu.here.ended("under.1")
    assert succeeded_once(job)
    assert ([end["reason"] for end in job.history], job.failures) == (["device", ""], 0)


def test_nothing_of_it_is_left_when_worker_and_guardian_are_killed_together(gpu: Gpu) -> None:
    noted = gpu.noted("daemons")[-1]
    daemon = [psutil.Process(noted["pid"]), psutil.Process(noted["server"])]
    guardian = daemon[0].parent()
    assert guardian is not None
    worker = guardian.parent()
    assert worker is not None
    for process in (worker, guardian):
        process.suspend()
    for process in (worker, guardian):
        process.kill()

    wait_for(lambda: gone(daemon), START_S, "neither daemon nor server lives on")
    wait_for(lambda: gpu.noted("daemons")[-1] != noted, START_S, "the next worker has its own")
    gpu.here.submit("next.1", "sleep:0.1")
    assert succeeded_once(gpu.here.ended("next.1"))


def test_when_the_worker_stops_its_daemon_does_too(gpu: Gpu) -> None:
    assert gpu.worker.stop() == 0

    assert gpu.here.left() == []
    assert not os.path.exists(f"{gpu.noted('daemons')[-1]['pipes']}/control"), "in good order"


@pytest.fixture
def operators(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a daemon that somebody else runs."""
    notes, pipes = tmp_path / "notes", tmp_path / "p"
    notes.mkdir()
    ours = {"FAKE_MPS": str(notes), MPS_PIPES: str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(notes)}
    process = subprocess.Popen([FAKE / CONTROL, "-f"], env={**os.environ, **ours}, cwd=tmp_path)
    wait_for(lambda: (notes / "daemons").exists(), START_S, "it runs")
    yield ours
    assert process.poll() is None, "it is not the worker's to end"
    subprocess.run([FAKE / CONTROL], input=b"quit\n", env={**os.environ, **ours}, check=True)
    assert process.wait(START_S) == 0


def test_a_daemon_of_the_operators_is_used_and_left(here: Site, operators: dict[str, str]) -> None:
    gpu = Gpu(here, **{MPS_PIPES: operators[MPS_PIPES]})
    here.submit("b.1", "await:go")

    assert gpu.pipes_of("b.1") == operators[MPS_PIPES]
    assert gpu.noted("daemons") == [], "no other was started"
    gpu.lets("go")
    assert succeeded_once(here.ended("b.1"))
    assert gpu.worker.stop() == 0


def test_where_gpus_are_not_shared_a_worker_has_one_slot() -> None:
    assert slots_for(Device("gpu", "GPU", UUID), 4, gpus=1, share="off") == 1


@pytest.mark.parametrize("lacks", ["program", "start"])
def test_where_it_cannot_be_had_jobs_take_turns_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks == "start":
        monkeypatch.setenv("PATH", str(FAKE), prepend=os.pathsep)
        monkeypatch.setenv("FAKE_MPS", str(tmp_path))
        (tmp_path / "refuses").write_text("")
    device = Device("gpu", "GPU", UUID)

    assert mps_of(device, tmp_path, "auto", slots=2) is None
    with pytest.raises(MachineError):
        mps_of(device, tmp_path, "mps", slots=2)


@pytest.mark.parametrize(("share", "slots", "kind"), [("timeslice", 2, "gpu"), ("auto", 1, "gpu"), ("auto", 2, "cpu")])
def test_who_does_not_want_it_or_has_no_use_for_it_starts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, slots: int, kind: str
) -> None:
    monkeypatch.setenv("PATH", str(FAKE), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_MPS", str(tmp_path))

    assert mps_of(Device(kind, "GPU", UUID), tmp_path, share, slots) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_path_is_too_long_for_sockets_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(FAKE), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_MPS", str(tmp_path))
    cache = tmp_path / ("long" * 25)
    cache.mkdir()
    mps = Mps(Device("gpu", "GPU", UUID), cache, own=True)
    mps.start()
    pipes = Path(mps.environment[MPS_PIPES])
    try:
        assert mps.alive()
        assert len(str(pipes)) < 80
    finally:
        mps.close()
    assert not pipes.exists()
