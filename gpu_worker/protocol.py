"""What a worker and its trainer say to each other: JSON lines, one job after the other.

The worker writes a request on the trainer's standard input; the trainer writes events on the descriptor that
LORAQ_EVENTS_FD names. Standard output and standard error are the job's log, whoever prints there.

    worker                         trainer
      |                              | imports Unsloth
      |  <----- {"type": "ready"} ---|
      |--- request ----------------> |
      |  <-- progress, checkpoint, answer  SIGUSR1 asks for a checkpoint at the next step's end
      |  <----- result or failed ----|  one of them ends the job; the next request may follow where it says goes_on
      |--- end of file ------------> | leaves
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

EVENTS_FD = "LORAQ_EVENTS_FD"


@dataclass(frozen=True)
class Request:
    """One job for a trainer."""

    job_id: str
    spec: dict[str, Any]  # a jobqueue.spec.WorkSpec, its sources made readable for this machine
    output: str  # an empty folder for everything that the job leaves behind
    adapter: str | None = None  # the folder (or hub id) of the adapter that is asked, exported, or gone on from
    resume: str | None = None  # the folder of the checkpoint that training goes on from
    rung: int = 0  # of the ladder of splits, where this attempt begins; grows when memory ran out
    budget_bytes: int | None = None  # of the GPU, at most, the CUDA context included; None: nothing is known of it
    correction: float = 1.0  # measured peak over estimate, of jobs like this one
    ran_out: bool = False  # memory has run out in an attempt before this one
    gguf_converter: str | None = None  # llama.cpp's script that writes GGUF files, of this machine
    members: tuple[str, ...] = ()  # the folders of the adapters that an evaluation merges

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True)
class Progress:
    """Where a job is. Fields that do not apply are None and are left out."""

    phase: Literal["load", "data", "train", "evaluate", "judge", "answer", "save"]
    step: int | None = None  # optimizer steps done, or questions answered, or answers rated
    steps: int | None = None  # of so many
    epoch: float | None = None
    loss: float | None = None  # mean over the steps since the last logged one
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    reserved_bytes: int | None = None  # GPU memory that the trainer's allocator holds now
    budget_bytes: int | None = None  # what the job will hold itself to from now on, at most what it was given
    seconds_per_step: float | None = None  # this and what follows is added by the worker, see gpu_worker/pace.py
    peak_bytes: int | None = None  # the most memory that the attempt was seen to hold, the CUDA context included
    promised_bytes: int | None = None  # of that at most
    type: Literal["progress"] = "progress"


@dataclass(frozen=True)
class Checkpoint:
    """A folder of this machine from which training could go on; whoever hears of it may take it away."""

    step: int
    folder: str
    type: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True)
class Answer:
    """Of an answer to a prompt: what was added to it, and at its end the whole."""

    prompt: int  # its place among the prompts, from 0
    by: str  # a jobqueue.spec.Asked
    text: str
    done: bool = False
    cut: bool | None = None  # of a whole answer: whether it had to end before the model ended it
    type: Literal["answer"] = "answer"


@dataclass(frozen=True)
class Result:
    """The job succeeded."""

    outcome: dict[str, Any]
    goes_on: bool = True  # False: the trainer ends now, it could not give back what the job had used
    type: Literal["result"] = "result"


@dataclass(frozen=True)
class Failed:
    """The job failed in a way that the trainer could name."""

    reason: str  # a jobqueue.job.FailureReason
    message: str  # one line
    rung: int | None = None  # where the next attempt begins, after memory ran out; None: nothing smaller is left
    type: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Ready:
    """The trainer has imported everything and waits for a request."""

    versions: dict[str, str] = field(default_factory=dict)
    warning: str = ""  # what went wrong before there was a job whose log could tell
    type: Literal["ready"] = "ready"


Event = Progress | Checkpoint | Answer | Result | Failed | Ready
_KINDS: dict[str, type[Event]] = {
    "progress": Progress,
    "checkpoint": Checkpoint,
    "answer": Answer,
    "result": Result,
    "failed": Failed,
    "ready": Ready,
}


def encode(event: Event) -> bytes:
    """One line, without the fields that are None."""
    return json.dumps({key: value for key, value in asdict(event).items() if value is not None}).encode() + b"\n"


def decode(line: bytes | str) -> Event:
    """The event of one line. Raises ValueError where it is none."""
    fields = json.loads(line)
    try:
        return _KINDS[fields["type"]](**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an event: {line!r}") from error
