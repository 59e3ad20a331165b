"""What a job is: its states, why it fails, the legal moves, and the record as it is read from the store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from jobqueue.notification import Told

SILENT_HEARTBEATS = 3  # a worker that has missed so many is not alive


class JobState(StrEnum):
    WAITING = "waiting"  # for other jobs, or for its memory estimate
    HELD = "held"  # would be queued, but somebody wants it to wait
    QUEUED = "queued"  # may be claimed (not before its `not_before`)
    RUNNING = "running"  # claimed by a slot that holds its lease
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


# The only moves that the store makes. store.lua asks for the state before each of them.
MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.WAITING: frozenset({JobState.QUEUED, JobState.HELD, JobState.CANCELLED, JobState.FAILED}),
    JobState.HELD: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.HELD, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.HELD, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.SUCCEEDED: frozenset(
        {JobState.WAITING}
    ),  # by `retry` alone, as the next two; of reports and judgings only
    JobState.FAILED: frozenset({JobState.WAITING}),
    JobState.CANCELLED: frozenset({JobState.WAITING}),
}


class FailureReason(StrEnum):
    BAD_SPEC = "bad_spec"  # the spec can never work: no such model, an option the model refuses
    BAD_DATA = "bad_data"  # no usable row, missing columns, nothing left to train on
    OUT_OF_MEMORY = "out_of_memory"
    NAN_LOSS = "nan_loss"
    CRASHED = "crashed"  # the trainer ended without a word
    LOST = "lost"  # the lease ended without a renewal, and nobody can say why
    CUT_OFF = "cut_off"  # the server was away for a lease; the worker lives and says so; costs no failure
    TIMED_OUT = "timed_out"
    STORAGE = "storage"
    ENDPOINT = "endpoint"  # the judge's does not answer, or only with errors
    REFUSED = "refused"  # the judge's endpoint refuses the key, the model or the request
    DEVICE = "device"  # the GPU failed under it, or others took its memory; costs no failure
    WRONG_EXPORT = "wrong_export"  # what was written does not answer as the adapter does
    PREEMPTED = "preempted"  # the worker was told to stop; costs no failure
    DEPENDENCY = "dependency"  # a job that this one needs did not succeed
    INTERNAL = "internal"  # an exception nobody foresaw; the log has it


class JobKind(StrEnum):
    TRAIN = "train"
    EVALUATE = "evaluate"
    EXPORT = "export"
    JUDGE = "judge"
    REPORT = "report"
    ASK = "ask"
    PREVIEW = "preview"

    @property
    def control(self) -> bool:
        """Whether a control worker does it, without a GPU."""
        return self in (JobKind.JUDGE, JobKind.REPORT, JobKind.PREVIEW)


OF_NO_BATCH = ("base-", "ask-", "preview-")
"""How the ids of jobs begin that belong to none."""


@dataclass(frozen=True)
class Claim:
    """The right to work on a job, as handed out by the store; every write of the attempt carries it."""

    job_id: str
    attempt: int  # the fence: grows with each claim
    nonce: str  # random, so that a fence that went back after a failover is noticed
    spec: dict[str, Any]
    batch: str
    failures: int
    lease_s: float
    submission: str = ""  # random, of the submit that made the job
    need_bytes: int = 0  # what it was admitted for at least
    rung: int = 0  # where this attempt begins in the ladder of splits

    @property
    def leaves_files(self) -> bool:
        """Whether the job leaves anything in the storage; the answers to a question are in its record alone."""
        return bool(self.spec["kind"] != JobKind.ASK)


@dataclass(frozen=True)
class Settlement:
    """The end of an attempt. `state` queued means: again, `delay_s` from now."""

    state: JobState
    reason: str = ""
    message: str = ""
    outcome: Mapping[str, Any] | None = None
    delay_s: float = 0.0
    counts: bool = False  # as one more failure
    rung: int = 0  # after memory ran out: where the next attempt begins
    need_bytes: int = 0  # after memory ran out: what the job needs, where that is more than was thought


@dataclass(frozen=True)
class Job:
    """One job as the store has it. Times are seconds since the epoch, 0 where not yet."""

    id: str
    kind: JobKind
    state: JobState
    batch: str  # "" for the evaluation of a base model, which serves many batches
    trial: str  # label of the configuration, what differs from its siblings
    owner: str
    spec: dict[str, Any]
    priority: int
    need_bytes: int  # estimated peak on the GPU; 0 until known
    attempt: int
    failures: int
    submitted_at: float
    queued_at: float
    claimed_at: float
    ended_at: float
    not_before: float
    worker: str  # who has it, or had it last
    reason: FailureReason | None
    message: str  # why it failed, one line
    cancel_requested: bool
    waits: int  # jobs that it still waits for
    rung: int = 0  # of its ladder of splits, where the next attempt begins; see jobqueue/microbatch.py
    queue: str = ""  # the memory class it waits in; "" while its size is not known
    held: bool = False  # not to be claimed until it is released
    lease_s: float = 0.0  # how long its last claim lasts, or lasted, without a renewal
    needs: tuple[str, ...] = ()  # jobs that had to succeed before it
    progress: dict[str, Any] = field(default_factory=dict)  # the last progress event
    outcome: dict[str, Any] = field(
        default_factory=dict
    )  # what a succeeded job reports; of another the `last_lines` of its log
    history: list[dict[str, Any]] = field(default_factory=list)  # ended attempts, oldest first

    @property
    def seconds(self) -> float:
        """How long the last attempt took, or has taken where `ended_at` is 0 (then 0)."""
        return max(0.0, self.ended_at - self.claimed_at) if self.ended_at and self.claimed_at else 0.0

    @property
    def has_adapter(self) -> bool:
        """Whether it makes one: a training (of all weights: a model), or the evaluation of merged ones."""
        return self.kind is JobKind.TRAIN or bool(self.spec.get("members"))

    @property
    def of_trial(self) -> str:
        """BATCH/NUMBER, or BATCH/NAME of merged adapters, of a job that belongs to one."""
        return f"{self.batch}/{self.id[len(self.batch) + 1 :].partition('.')[0]}"

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Job:
        """The record of `{loraq}:job:<id>`, see store.lua."""

        def number(key: str) -> float:
            return float(record.get(key) or 0)

        def parsed(key: str, default: Any) -> Any:
            return json.loads(record[key]) if record.get(key) else default

        return cls(
            id=record["id"],
            kind=JobKind(record["kind"]),
            state=JobState(record["state"]),
            batch=record.get("batch", ""),
            trial=record.get("trial", ""),
            owner=record.get("owner", ""),
            spec=parsed("spec", {}),
            priority=int(number("priority")),
            need_bytes=int(number("need")),
            attempt=int(number("attempt")),
            failures=int(number("failures")),
            submitted_at=number("submitted_at") / 1000,
            queued_at=number("queued_at") / 1000,
            claimed_at=number("claimed_at") / 1000,
            ended_at=number("ended_at") / 1000,
            not_before=number("not_before") / 1000,
            worker=record.get("worker", "").partition("#")[0],
            reason=FailureReason(record["reason"]) if record.get("reason") else None,
            message=record.get("message", ""),
            cancel_requested=record.get("cancel") == "1",
            waits=int(number("waits")),
            rung=int(number("rung")),
            queue=record.get("queue", ""),
            held=record.get("hold") == "1",
            lease_s=number("lease") / 1000,
            needs=tuple(parsed("needs", [])),
            progress=parsed("progress", {}),
            outcome=parsed("outcome", {}),
            history=parsed("history", []),
        )


@dataclass(frozen=True)
class Batch:
    """The jobs of one submission, counted."""

    name: str
    owner: str
    submitted_at: float  # seconds since the epoch
    trials: int
    base_model: str
    states: Mapping[JobState, int]  # how many of its jobs are in each state; its report is one of them
    jobs: tuple[str, ...]  # ids in the order of the file; evaluations of base models last
    told: tuple[Told, ...] = ()  # who was told of its end, or is to be

    @property
    def ended(self) -> bool:
        return all(state.final for state, count in self.states.items() if count)

    @property
    def state(self) -> JobState:
        """One word for the whole: the state of its least finished job, or the worst end."""
        order = (
            JobState.RUNNING,
            JobState.QUEUED,
            JobState.HELD,
            JobState.WAITING,
            JobState.FAILED,
            JobState.CANCELLED,
        )
        return next((state for state in order if self.states.get(state)), JobState.SUCCEEDED)


@dataclass(frozen=True)
class WorkerInfo:
    """One worker as it last described itself."""

    id: str  # host/gpu0, host/cpu, host/control; where two that live are called so, its `uid`
    host: str
    device: str  # "NVIDIA H100 80GB HBM3", "cpu", "control"
    uuid: str  # of the GPU, "" elsewhere
    usable_bytes: int
    slots: int
    running: tuple[str, ...]  # job ids
    seen_at: float  # seconds since the epoch
    alive: bool  # seen within the last three heartbeats
    note: str = ""  # why it takes no job, or less than it could, where that is so
    takes_jobs: bool = True  # or it is drained or sick, or pauses
    uid: str = ""  # what no other has: host/gpu0#3fa2c1
    boot: str = ""  # of its machine: tells machines of one name apart
    share: str = ""  # how its jobs share the GPU: mps, timeslice, off (one at a time); "" where there is none
    versions: Mapping[str, str] = field(default_factory=dict)
    # Of the device as it last looked, 0 or None where it does not say:
    total_bytes: int = 0
    used_bytes: int = 0
    promised_bytes: int = 0  # to the jobs that run, together
    utilization: int | None = None  # percent of a moment in which it computed
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    # Of what is around it:
    spares: int = 0  # trainers that stand ready and have done no job yet
    storage_writable: bool | None = None  # the shared one and its own disk; None: an older release says nothing of it
    webhooks: Sequence[str] = ()  # of a control worker: their names, and the hosts of others, that it may tell
    sweep_s: float | None = None  # of a control worker: how long its last sweep took, and when that ended
    swept_at: float | None = None

    @property
    def trains(self) -> bool:
        """Whether it trains, evaluates and answers; control workers do not."""
        return self.device != "control"

    @property
    def name(self) -> str:
        """host/gpu0, which workers of two machines may share."""
        return self.uid.partition("#")[0]

    @classmethod
    def from_record(cls, uid: str, record: str, now: float) -> WorkerInfo:
        """The entry of `{loraq}:workers`; without what newer releases add."""
        seen, _, text = record.partition(" ")
        info = json.loads(text)
        # what was said in the future was said before the clock went back
        silent_s = abs(now - float(seen) / 1000)
        info.setdefault("takes_jobs", not info.get("note"))  # of older releases
        known = {field.name for field in fields(cls)}
        return cls(
            id=uid,
            uid=uid,
            seen_at=float(seen) / 1000,
            alive=silent_s <= SILENT_HEARTBEATS * info.pop("every_s"),
            running=tuple(info.pop("running")),
            **{name: value for name, value in info.items() if name in known},
        )


def told_apart(workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """The same with their name as `id`; of several with one name, only where but one of them lives, and that one."""
    count = Counter(worker.name for worker in workers)
    living = Counter(worker.name for worker in workers if worker.alive)

    def alone(worker: WorkerInfo) -> bool:
        return count[worker.name] == 1 or (worker.alive and living[worker.name] == 1)

    return [replace(worker, id=worker.name) if alone(worker) else worker for worker in workers]
