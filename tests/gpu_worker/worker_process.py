"""A real worker of the CPU, as `loraq worker --cpu` starts it, with the trainer of tests/stub_trainer.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import psutil
from helpers import new_job, submit, wait_for

from gpu_worker.marks import MARK
from jobqueue.data_spec import DataSpec
from jobqueue.job import Job, JobState
from jobqueue.job_spec import TrainSpec
from jobqueue.settings import Settings
from jobqueue.spec import LoraSpec, ResourcesSpec, TrainingSpec
from jobqueue.storage import Storage
from jobqueue.store import NewJob, Store

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests" / "stub_trainer.py"
LEASE_S = 3.0
START_S = 30.0  # what a worker may take to its first claim on a busy machine


class Site:
    """One server, one storage, and the workers that a test starts; all that it started ends with it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.beats = folder / "beats"
        self.beats.mkdir(parents=True)
        self.store = Store(url)
        self.settings = Settings(redis_url=url, storage=str(folder / "storage"), data_dir=folder / "data", owner="ann")
        self.storage = Storage(self.settings.storage_url)
        self._started = 0

    def environment(self, **changes: object) -> dict[str, str]:
        ours = {
            "LORAQ_REDIS_URL": self.store.url,
            "LORAQ_STORAGE": self.settings.storage_url,
            "LORAQ_DATA_DIR": self.settings.data_dir,
            "LORAQ_CONFIG": os.devnull,
            "LORAQ_TRAINER_COMMAND": json.dumps([sys.executable, str(STUB)]),
            "LORAQ_BEATS": self.beats,
            "LORAQ_LEASE_S": LEASE_S,
            "LORAQ_RENEW_S": 0.3,
            "LORAQ_POLL_S": 0.2,
            "LORAQ_SWEEP_S": 0.2,
            "LORAQ_GRACE_S": 0.5,
            "LORAQ_HEARTBEAT_S": 0.5,
            "PYTHONPATH": ROOT,
            **changes,
        }
        return {**os.environ, **{name: str(value) for name, value in ours.items()}}

    def start(self, *options: str, **changes: object) -> Worker:
        """`loraq worker` with these options, else for the CPU."""
        self._started += 1
        log = self.folder / f"worker{self._started}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gpu_worker.main", *(options or ["--cpu"])],
                env=self.environment(**changes),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Worker(psutil.Process(process.pid), process, log)

    def listening(self) -> int:
        """How many processes of workers wait for tokens: of a `loraq worker --cpu`, two. They hear SIGTERM by then."""
        return sum(client["cmd"] == "brpop" for client in self.store._redis.client_list())

    def submit(self, job_id: str, words: str, timeout_minutes: float | None = None, **changes: object) -> None:
        """One train job whose trainer does what `words` say."""
        submit(self.store, train_job(job_id, words, timeout_minutes, **changes))

    def ended(self, job_id: str, seconds: float = START_S) -> Job:
        """The job at its end; what it waits for before a new attempt is cut short."""

        def look() -> Job | None:
            self.store._redis.zadd("{loraq}:delayed", {job_id: 0}, xx=True)
            job = self.store.job(job_id)
            return job if job.state.final else None

        return wait_for(look, seconds, f"{job_id} ends")

    def beating(self, job_id: str) -> int:
        """The process of the trainer that is at work on the job, once it has been for a moment."""
        known = len(self.lines(job_id))
        wait_for(lambda: len(self.lines(job_id)) >= known + 4, START_S, f"{job_id} is in mid-run")
        return int(self.lines(job_id)[-1].split()[0])

    def lines(self, job_id: str) -> list[str]:
        file = self.beats / job_id
        return [line for line in file.read_text().splitlines() if line] if file.exists() else []

    def trainers_in_turn(self, job_id: str) -> list[int]:
        """The trainers that worked on the job, by the times of their beats; one that comes twice did not wait."""
        beats = sorted((float(time), int(pid)) for pid, time, _ in map(str.split, self.lines(job_id)))
        return [pid for pid, _ in groupby(pid for _, pid in beats)]

    def beats_of(self, job_id: str, turn: int) -> list[float]:
        """When the trainer that was the job's first (0), second (1) and so on was at work; seconds since the epoch."""
        pid = self.trainers_in_turn(job_id)[turn]
        return sorted(float(at) for who, at, _ in map(str.split, self.lines(job_id)) if int(who) == pid)

    def left(self, *, trainers_only: bool = False) -> list[psutil.Process]:
        """Every living process that was started here, or only trainers, their guardians and children."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                ours = environment.get("LORAQ_BEATS") == str(self.beats)
                wanted = ours and (MARK in environment or not trainers_only)
                if wanted and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def close(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        wait_for(lambda: not self.left(), 5, "everything that was started here has ended")
        self.store.close()


class Worker:
    """A running `gpu_worker.main` and what it has started."""

    def __init__(self, supervisor: psutil.Process, process: subprocess.Popen[bytes], log: Path) -> None:
        self.supervisor, self._process, self.log = supervisor, process, log

    def celery(self) -> psutil.Process:
        """The process that serves the CPU."""
        return wait_for(
            lambda: [c for c in self.supervisor.children() if "cpu" in c.cmdline()], START_S, "the worker starts"
        )[0]

    def guardian(self) -> psutil.Process:
        """Of the only trainer."""
        return next(c for c in self.celery().children() if any("guardian.py" in word for word in c.cmdline()))

    def stop(self) -> int:
        """As `docker stop` does; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(START_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(5)


def train_job(job_id: str, words: str, timeout_minutes: float | None = None, **changes: object) -> NewJob:
    spec = TrainSpec(
        base_model=f"/stub/{words}",
        method="lora",
        data=DataSpec(source="nobody/reads-it"),
        lora=LoraSpec(),
        training=TrainingSpec(),
        resources=ResourcesSpec(timeout_minutes=timeout_minutes),
    )
    return new_job(job_id, **{"spec": spec.model_dump_json(), **changes})


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them lives; a zombie that nobody has collected yet does not."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@contextlib.contextmanager
def site(url: str, folder: Path) -> Iterator[Site]:
    opened = Site(url, folder)
    try:
        yield opened
    finally:
        opened.close()


def succeeded_once(job: Job) -> bool:
    return job.state is JobState.SUCCEEDED and [end["state"] for end in job.history].count("succeeded") == 1
