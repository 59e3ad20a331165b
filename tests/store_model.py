"""A model of the store in plain Python: what its records ought to say, for tests/jobqueue/test_state_machine.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobqueue.job import Claim
from jobqueue.store import NewJob

FINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Record:
    """What the store ought to know of one job."""

    new: NewJob
    seq: int
    state: str = "waiting"
    queue: str = ""
    waits_for: set[str] = field(default_factory=set)  # jobs, and "size"
    attempt: int = 0
    nonce: str = ""
    settled: tuple[int, str, str] | None = None  # attempt, nonce and state of what was last settled
    said: list[tuple[int, str]] = field(default_factory=list)  # attempt and log line
    attempt_said: int = 0
    failures: int = 0
    cancel: bool = False
    hold: bool = False
    delayed: bool = False
    lapsed: bool = False

    @property
    def place(self) -> str:
        """The one index in which it is that decides what happens to it."""
        if self.state == "queued":
            return "delayed" if self.delayed else f"queue:{self.queue}:{self.new.owner}"
        if self.state == "running":
            return "running"
        return "unsized" if self.state == "waiting" and "size" in self.waits_for else ""

    @property
    def places(self) -> list[str]:
        """Every index in which it is."""
        aside = f"queue:{self.state}:{self.new.owner}" if self.state in ("waiting", "held") else ""
        return [place for place in (aside, self.place) if place]


class Model:
    """The records, and how one job's end moves others."""

    def __init__(self) -> None:
        self.jobs: dict[str, Record] = {}
        self.seq = 0

    def add(self, new: NewJob) -> None:
        before = self.jobs.get(new.id)
        if before and before.state not in ("failed", "cancelled"):
            before.cancel = False
            return
        self.seq += 1
        record = Record(new, self.seq, queue=new.queue)
        if before:
            record.attempt, record.said = before.attempt, before.said
            record.nonce, record.settled, record.attempt_said = before.nonce, before.settled, before.attempt_said
        self.jobs[new.id] = record
        self.begin(record)

    def begin(self, record: Record) -> None:
        others = {*record.new.needs, *record.new.follows}
        record.state = "waiting"
        record.waits_for = {other for other in others if self.jobs[other].state not in FINAL}
        if not record.queue:
            record.waits_for.add("size")
        self.look(record)

    def look(self, record: Record) -> None:
        if record.state == "waiting" and not record.waits_for:
            self.enqueue(record, delayed=False)

    def enqueue(self, record: Record, delayed: bool) -> None:
        record.state, record.delayed = "held" if record.hold else "queued", delayed

    def finish(self, job_id: str, state: str) -> None:
        self.jobs[job_id].state = state
        for other in list(self.jobs.values()):
            if job_id not in other.waits_for:
                continue
            if job_id in other.new.needs and state != "succeeded":
                if other.state == "waiting":
                    self.finish(other.new.id, "cancelled")
            else:
                other.waits_for.discard(job_id)
                self.look(other)

    def owns(self, claim: Claim) -> bool:
        job = self.jobs[claim.job_id]
        return job.state == "running" and (job.attempt, job.nonce) == (claim.attempt, claim.nonce)

    def claimable(self, queues: tuple[str, ...], free: int) -> list[Record]:
        return [
            job
            for job in self.jobs.values()
            if job.state == "queued" and not job.delayed and job.queue in queues and job.new.need <= free
        ]
