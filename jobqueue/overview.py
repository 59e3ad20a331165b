"""The whole cluster at one moment: workers, what runs, what waits and for what, and when all of it may be done."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from jobqueue.job import Job, JobKind, JobState, WorkerInfo, told_apart
from jobqueue.memory import GIB

LASTING = (JobKind.TRAIN, JobKind.EVALUATE, JobKind.EXPORT)
"""Kinds of jobs that keep a device busy for so long that they decide when the queue will be empty."""


@dataclass(frozen=True)
class Waiting:
    """A job that does not run."""

    job: Job
    waits_for: str  # a few words


@dataclass(frozen=True)
class Overview:
    """The cluster as the server saw it. Its jobs are without spec, outcome and history."""

    now: float  # seconds since the epoch, by the server's clock
    owner: str  # whose jobs alone are counted and listed; "" for all
    host: str  # or worker: of which alone workers, and what runs there, are listed; "" for all
    workers: tuple[WorkerInfo, ...]
    held_classes: tuple[str, ...]
    counts: Mapping[JobState, int]  # jobs that have not ended
    classes: Mapping[str, int]  # memory class -> jobs that may be claimed now
    ended: Mapping[JobState, int]  # within the last hour; of the newest 1,024
    running: tuple[Job, ...]  # worker by worker; of these and of what waits the first ones
    queue: tuple[Waiting, ...]  # what may be claimed, by priority; then what was delayed, is held, or waits
    empty_in_s: float | None  # see `empty_in`
    quiet_s: int = 0  # nothing is claimed for so long, as another server process may know less than the last one

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any], owner: str, host: str) -> Overview:
        """Of the function `overview` in store.lua."""
        now, held = answer["now"] / 1000, tuple(sorted(answer["held_classes"]))
        quiet_s = math.ceil(answer["quiet"] / 1000)
        workers = workers_of(answer)
        made = cls(
            now=now,
            owner=owner,
            host=host,
            workers=tuple(worker for worker in workers if host in ("", worker.uid, worker.name, worker.host)),
            held_classes=held,
            counts={JobState(state): count for state, count in answer["counts"].items()},
            classes=dict(answer["classes"]),
            ended={state: _sum(answer["ended"], state) for state in JobState if state.final},
            running=tuple(Job.from_record(record) for record in answer["running"]),
            queue=tuple(
                Waiting(job, waits_for(job, workers, held, now, quiet_s))
                for state in ("queued", "delayed", "held", "waiting")
                for job in map(Job.from_record, answer[state])
            ),
            empty_in_s=None,
            quiet_s=quiet_s,
        )
        opened = Counter[str]()
        for (kind, _), count in live_of(answer).items():
            opened[kind] += count
        return replace(made, empty_in_s=empty_in(made, opened, answer["ended"]))


def workers_of(answer: Mapping[str, Any]) -> list[WorkerInfo]:
    """What they run, and whether they are drained, the server knows before the workers say so."""
    found = []
    for uid, record in sorted(answer["workers"].items()):
        worker = WorkerInfo.from_record(uid, record, answer["now"] / 1000)
        if {worker.uid, worker.name, worker.host} & set(answer["drained"]):
            worker = replace(worker, note="drained", takes_jobs=False)
        found.append(replace(worker, running=tuple(sorted(answer["busy"].get(uid, ())))))
    return told_apart(found)


def live_of(answer: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Kind and state -> jobs that have not ended."""
    found = {}
    for what, count in answer["live"].items():
        kind, _, state = what.partition(" ")
        found[kind, state] = int(count)
    return found


def _sum(ended: Sequence[tuple[str, str, int, float]], state: JobState) -> int:
    return sum(count for _, how, count, _ in ended if how == state)


def waits_for(
    job: Job, workers: Sequence[WorkerInfo], held_classes: Collection[str], now: float, quiet_s: int = 0
) -> str:
    """What keeps a job from running, in a few words."""
    if job.state is JobState.HELD:
        return "its release"
    if job.state is JobState.WAITING:
        return _needed(job) if job.queue else "a worker's estimate of its memory"
    if job.not_before > now:
        why = f", after it failed ({job.reason})" if job.reason else ""
        return time.strftime("%H:%M:%S", time.localtime(job.not_before)) + why
    if job.queue in held_classes:
        return f"the release of {job.queue}"
    able, living = _able(job, workers), _living(job, workers)
    if not able:
        most = max((worker.usable_bytes for worker in living), default=0)
        return f"a larger worker: the largest that lives has {most / GIB:.1f} GiB" if living else "a worker"
    ready = [worker for worker in able if worker.takes_jobs]
    if not ready:
        return f"{able[0].id}: {able[0].note}"
    if quiet_s:
        return f"{quiet_s} s, as the server was started anew"
    idle = [worker for worker in ready if len(worker.running) < worker.slots]
    if not idle:
        return "a slot"
    fits = job.kind.control or any(worker.usable_bytes - worker.promised_bytes >= job.need_bytes for worker in idle)
    return "its turn" if fits else f"{job.need_bytes / GIB:.1f} GiB that no other job has"


def _needed(job: Job) -> str:
    if job.needs:
        return job.needs[0] + (f" and {len(job.needs) - 1} more" if len(job.needs) > 1 else "")
    return f"{job.waits} jobs" if job.waits > 1 else "another job"


def _living(job: Job, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """The workers that are there for jobs of this sort; those of CPUs for all, where no GPU worker lives."""
    alive = [worker for worker in workers if worker.alive]
    on_gpus = [worker for worker in alive if worker.device not in ("cpu", "control")]
    if job.kind.control:
        return [worker for worker in alive if not worker.trains]
    if job.queue == "cpu" or not on_gpus:
        return [worker for worker in alive if worker.device == "cpu"]
    return on_gpus


def _able(job: Job, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """Those of them that could hold it, if nothing else ran there."""
    return [w for w in _living(job, workers) if job.kind.control or w.usable_bytes >= job.need_bytes]


def left_s(progress: Mapping[str, Any]) -> float | None:
    """Seconds until the phase of a progress event is done, at its pace; None where that is not known."""
    step, steps, pace = progress.get("step"), progress.get("steps"), progress.get("seconds_per_step")
    return None if step is None or not steps or not pace else max(0, steps - step) * pace


def empty_in(seen: Overview, opened: Mapping[str, int], ended: Sequence[tuple[str, str, int, float]]) -> float | None:
    """Seconds until no job is left, if as many run at a time as now, and each takes as long as its like.

    That is what jobs of its kind that run now are going to take, or else what those of the last hour took. None where
    it would be a guess: nothing runs, no job of a kind has shown what it takes, something is held, a job waits for a
    worker that is not there, or only a part is looked at.

    Args:
        opened: jobs that have not ended, by kind.
        ended: (kind, state, how many, their seconds) within the last hour.
    """
    if seen.owner or seen.host or seen.held_classes or seen.counts[JobState.HELD] or seen.quiet_s:
        return None
    if not sum(seen.counts.values()):
        return 0.0
    now = [job for job in seen.running if job.kind in LASTING]
    if not now or any(not _able(waiting.job, seen.workers) for waiting in seen.queue if waiting.job.queue):
        return None
    work = 0.0
    for kind in LASTING:
        like = [whole for job in now if job.kind is kind and (whole := _whole_s(job, seen.now))]
        like = like or [took / count for of, how, count, took in ended if (of, how) == (kind, JobState.SUCCEEDED)]
        if opened.get(kind, 0) > 0:
            if not like:
                return None
            work += opened[kind] * fmean(like)
    at_once = seen.counts[JobState.RUNNING] * len(now) / len(seen.running)  # the list may be cut
    done = at_once * fmean(seen.now - job.claimed_at for job in now)
    last = max(left_s(job.progress) or 0.0 for job in now)
    return max(last, (work - done) / at_once)


def _whole_s(job: Job, now: float) -> float | None:
    """Seconds that a running job takes from its claim to its end; one that was resumed, with what it did before."""
    left = left_s(job.progress)
    if left is None:
        return None
    of_all_steps: float = job.progress["steps"] * job.progress["seconds_per_step"]
    return max(now - job.claimed_at + left, of_all_steps)
