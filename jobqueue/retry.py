"""What each failure leads to; pure, one table."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from jobqueue.errors import LoraqError
from jobqueue.job import FailureReason as R
from jobqueue.job import Job, JobState, Settlement


@dataclass(frozen=True)
class Rule:
    """How often a job may fail for this reason before it has failed for good, and how long it waits in between."""

    failures: int  # 1: never tried again
    meaning: str
    remedy: str  # what a person can do about it
    delay_s: float = 0.0  # doubled with each failure
    counts: bool = True  # False: costs no failure, and is tried again however many there were
    in_a_row: int = 0  # of a reason that does not count: so many attempts on end, and the job is to blame; 0: never
    settings: str = "the same"  # of the next attempt


TABLE = {
    R.BAD_SPEC: Rule(
        1,
        "The spec can never work: there is no such model, or the model refuses an option.",
        "Correct the sweep file and submit it again.",
    ),
    R.BAD_DATA: Rule(
        1,
        "No usable row, missing columns, nothing left to train on.",
        "Correct the data and submit again; `--dry-run` checks it first.",
    ),
    R.OUT_OF_MEMORY: Rule(  # until there is no smaller one: see jobqueue/microbatch.py
        1,
        "The GPU's memory, or the host's, was not enough.",
        "Lower `max_seq_length` or `lora.r`, train with `method: qlora`, or start a worker with a larger GPU.",
        counts=False,
        settings="activations are recomputed, then half the micro-batch, accumulation makes up for it; at one row more "
        "memory, until the job has had the largest GPU to itself",
    ),
    R.NAN_LOSS: Rule(
        1,
        "The loss, the gradients or the weights became NaN or infinite.",
        "Lower `learning_rate`, add `warmup_steps`, look at the data; in float16 try `dtype: bfloat16`.",
    ),
    R.TIMED_OUT: Rule(
        1,
        "The attempt took longer than `resources.timeout_minutes`.",
        "`loraq retry` goes on from the newest checkpoint, with as much time again.",
    ),
    R.DEPENDENCY: Rule(
        1, "A job that this one needs did not succeed.", "See why that one did not; `loraq retry` runs both again."
    ),
    R.INTERNAL: Rule(
        2,
        "An exception that nobody foresaw; its traceback is in the log.",
        "Read `loraq logs JOB`; where it is a fault of loraq's, report it.",
        delay_s=5,
    ),
    R.CRASHED: Rule(
        3,
        "The trainer ended without a word, or gave no sign of life.",
        "Read `loraq logs JOB`. SIGKILL is often the kernel's answer to a host without memory.",
        delay_s=5,
    ),
    R.LOST: Rule(
        3,
        "The worker stopped renewing the job: it was killed, its host died, or it was cut off from Redis for longer "
        "than others were.",
        "Look at the host and its network; `loraq workers` shows who is silent.",
    ),
    R.CUT_OFF: Rule(
        1,
        "Redis did not answer for a lease: at half of it a checkpoint was asked for, at its end the trainer was ended.",
        "Look at the server, and at the network to it.",
        counts=False,
        in_a_row=5,
    ),
    R.STORAGE: Rule(  # the worker pauses as well, see gpu_worker/worker.py
        5,
        "The shared storage or a disk of the host could not be written or read: full, read-only, gone, or it hangs.",
        "Free space, or mount it again; the worker takes jobs again by itself.",
        delay_s=30,
    ),
    R.ENDPOINT: Rule(
        3,
        "The judge's endpoint did not answer, or only with errors, however often a request was sent again.",
        "See `base_url` and the endpoint's limits. What was rated is kept: `loraq retry` asks for the rest alone.",
        delay_s=30,
    ),
    R.REFUSED: Rule(
        1,
        "The judge's endpoint refused the key, the model or the request, or a worker may not talk to it.",
        "Put right what the message says. What was rated is kept: `loraq retry` asks for the rest alone.",
    ),
    R.DEVICE: Rule(  # on another GPU: the worker takes none meanwhile
        1,
        "The GPU failed under the job, other processes took its memory, or a fault took down its MPS server.",
        "See `loraq workers`: reset the card, or end what else uses it.",
        counts=False,
        in_a_row=3,
    ),
    R.WRONG_EXPORT: Rule(
        1,
        "The exported model does not answer as the adapter does; nothing of it was kept.",
        "The adapter itself is fine. The message has how far off it was: take a newer GGUF converter, "
        "another `quantization_method`, or `merged_16bit` alone; report it where that is wrong too.",
    ),
    R.PREEMPTED: Rule(
        1, "The worker was drained or stopped; a checkpoint was written first.", "Nothing: it goes on.", counts=False
    ),
}


@dataclass(frozen=True)
class Decision:
    """Whether to try again, when, and whether it counts as a failure."""

    again: bool
    delay_s: float = 0.0
    counts: bool = True


def check_succeeded(job: Job, otherwise: str) -> None:
    """Raises LoraqError with the remedy where a job that somebody waited for has not succeeded."""
    if job.state is not JobState.SUCCEEDED:
        remedy = TABLE[job.reason].remedy if job.reason else ""
        raise LoraqError(f"{otherwise}: {job.id} {job.state}: {job.message}", remedy)


def decide(reason: R, failures: int, max_failures: int, jitter: float | None = None, *, in_a_row: int = 1) -> Decision:
    """The decision after one more failure.

    Args:
        reason: of this failure.
        failures: how many the job had before.
        max_failures: the user's cap, over all reasons; the table's own may be lower.
        jitter: 0 to 1, for tests; the delay is spread over 0.5 to 1.5 of its nominal length, so that jobs that
            failed together do not come back together.
        in_a_row: how many attempts on end, this one included, ended for this reason.
    """
    rule = TABLE[reason]
    if not rule.counts:
        return Decision(again=not rule.in_a_row or in_a_row < rule.in_a_row, counts=False)
    if failures + 1 >= min(rule.failures, max_failures):
        return Decision(again=False)
    spread = 0.5 + (random.random() if jitter is None else jitter)
    return Decision(again=True, delay_s=rule.delay_s * 2**failures * spread)


def after_failure(reason: R, message: str, failures: int, max_failures: int, before: Sequence[str] = ()) -> Settlement:
    """How an attempt ends that failed for this reason.

    Args:
        failures: that the job had before.
        before: the reasons of all its earlier attempts, oldest first.
    """
    in_a_row = 1 + sum(1 for _ in takewhile(lambda earlier: earlier == reason, reversed(before)))
    decision = decide(reason, failures, max_failures, in_a_row=in_a_row)
    return Settlement(
        state=JobState.QUEUED if decision.again else JobState.FAILED,
        reason=reason,
        message=message,
        delay_s=decision.delay_s,
        counts=decision.counts,
    )
