"""What must hold after a chaos run, whatever happened in it, and the figures that a run is summed up with.

A job may fail at its cap, jobqueue/retry.py says when: three attempts that were killed are enough. The table is part of
what is tested, so the driver does not lift it. Instead every attempt that ended badly must have a cause: a fault that
leads to that reason, on the host of that attempt (or on the server), while the attempt lasted. A job that failed, was
retried or was cancelled without one is a problem, and one that failed with them is counted as `failed_at_cap`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from faults import Fault
from hosts import LEASE_S
from jobs import BEAT_S, REAL_MODEL, REAL_QUESTIONS, REAL_STEPS, steps
from safetensors.numpy import load_file

from jobqueue.job import Job, JobKind, JobState
from jobqueue.storage import Storage, job_folder
from jobqueue.store import Store

BROKEN = ("lost", "doubled", "overlapping", "disordered", "unexplained", "real_broken")
SAME_LOSS = 0.01  # of trains that were interrupted and of those that were not
SLACK_S = 1.0  # between the driver's note of a fault and what the server's clock says of its effect
SERVER = {"server_kill", "server_stop", "client_kill"}
STORAGE = {"storage_away", "storage_full", "storage_hangs"}
HOST_DOWN = {
    "supervisor_kill",
    "celery_kill",
    "worker_stop_short",
    "worker_stop_long",
    "worker_stop_then_kill",
    "cut_off",
}
CAUSES = {
    "crashed": {"trainer_kill", "guardian_kill", "spare_kill"},
    "lost": SERVER | HOST_DOWN | {"drain", "memory_full"},
    "cut_off": SERVER | {"cut_off"},
    "storage": STORAGE,
    "preempted": {"drain"},
}


@dataclass
class Verdict:
    """What is to be said of a run."""

    problems: list[str]
    figures: dict[str, Any]
    faults: dict[str, int]  # by kind
    jobs: list[list[Any]] = field(default_factory=list)  # id, state, reason, attempts, failures, steps, steps done

    def text(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.figures.items()]
        lines.append("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())))
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Stint:
    """One trainer's time at a job: from its first beat to its last."""

    pid: int
    began: float
    ended: float
    beats: int
    seconds: tuple[tuple[int, float], ...] = ()  # that went by at a step, the first beat's not known and guessed


def stints(file: Path) -> list[Stint]:
    """Of one job, by their begin. A last line that kill -9 cut off does not count."""
    beats: dict[int, list[tuple[float, int]]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        words = line.split()
        if len(words) == 3:
            beats.setdefault(int(words[0]), []).append((float(words[1]), int(words[2])))
    found = [_stint(pid, sorted(said)) for pid, said in beats.items()]
    return sorted(found, key=lambda stint: stint.began)


def _stint(pid: int, beats: list[tuple[float, int]]) -> Stint:
    (began, _), (ended, _) = beats[0], beats[-1]
    before = [began - BEAT_S, *(at for at, _ in beats)]
    seconds = tuple((step, at - last) for (at, step), last in zip(beats, before, strict=False))
    return Stint(pid, began, ended, len(beats), seconds)


def thrown_away(found: list[Stint]) -> float:
    """Seconds of trainers at steps that a later trainer of the job has done again."""
    wasted, again = 0.0, set[int]()
    for stint in reversed(found):
        wasted += sum(seconds for step, seconds in stint.seconds if step in again)
        again |= {step for step, _ in stint.seconds}
    return wasted


def overlaps(found: list[Stint]) -> list[str]:
    return [
        f"trainers {one.pid} and {other.pid} overlap by {one.ended - other.began:.2f} s"
        for one, other in pairwise(found)
        if other.began <= one.ended
    ]


def judge(run: Any, store: Store, jobs: list[Job]) -> Verdict:
    """`jobs`: all that were submitted, as they are at the end; `run`: the driver."""
    verdict = Verdict(run.problems, {}, dict(Counter(fault.kind for fault in run.faults)))
    storage = Storage(str(run.folder / "storage"))
    if len(jobs) != len(run.ids):
        verdict.problems.append(f"{len(run.ids)} jobs were submitted, {len(jobs)} are there")
    by_id = {job.id: job for job in jobs}
    totals: Counter[str] = Counter()
    trainer_s = {"all": 0.0, "wasted": 0.0, "cancelled": 0.0}
    for job in jobs:
        worked = stints(run.folder / "beats" / job.id)
        wanted, done = _steps(job, worked)
        spent = sum(seconds for stint in worked for _, seconds in stint.seconds)
        made = Path(storage.address(job_folder(job.id, job.batch)))
        checks = {
            "lost": _lost(job, storage, wanted, done),
            "real_broken": _real_broken(job, storage),
            "doubled": _doubled(job, store),
            "overlapping": overlaps(worked),
            "disordered": _disordered(job, by_id),
            "unexplained": _unexplained(job, run.faults, {host.name for host in run.hosts}, by_id),
        }
        for name, found in checks.items():
            totals[name] += bool(found)
            verdict.problems += [f"{job.id} ({job.state}): {problem}" for problem in found]
        totals[job.state] += 1
        totals["attempts"] += job.attempt
        totals["published_twice"] += len(list(made.glob("*/manifest.json"))) > 1
        if job.state is JobState.CANCELLED:
            trainer_s["cancelled"] += spent
        else:
            trainer_s["all"] += spent
            trainer_s["wasted"] += thrown_away(worked) if job.state is JobState.SUCCEEDED else spent
        verdict.jobs.append([job.id, job.state.value, job.reason, job.attempt, job.failures, wanted, done])
    real = [job for job in jobs if _is_real(job) and job.state is JobState.SUCCEEDED]
    trained = [job.outcome for job in real if job.kind is JobKind.TRAIN]
    totals["real_resumed"] = sum(bool(outcome["training"]["resumed_from_step"]) for outcome in trained)
    difference = _loss_difference(trained)
    if difference > SAME_LOSS:
        totals["real_broken"] += 1
        verdict.problems.append(f"the losses of equal real trains differ by {difference:g}")
    verdict.figures = {
        "jobs": len(jobs),
        "faults": len(run.faults),
        **{name: totals[name] for name in BROKEN},
        "wasted_share": round(trainer_s["wasted"] / max(1.0, trainer_s["all"]), 4),
        "succeeded": totals[JobState.SUCCEEDED],
        "failed_at_cap": totals[JobState.FAILED],
        "cancelled": totals[JobState.CANCELLED],
        **{name: totals[name] for name in ("attempts", "published_twice")},
        **{f"trainer_s_{name}": round(seconds, 1) for name, seconds in trainer_s.items()},
        "real_succeeded": len(real),
        "real_trained": len(trained),
        "real_resumed": totals["real_resumed"],
        "real_attempts": sum(job.attempt for job in jobs if _is_real(job)),
        "real_loss_difference": round(difference, 6),
    }
    return verdict


def _is_real(job: Job) -> bool:
    return bool(job.spec.get("base_model") == REAL_MODEL)


def _steps(job: Job, worked: list[Stint]) -> tuple[int, int]:
    """How many steps there are to do, and how many were done; of a real train, how many losses are there."""
    if job.kind is JobKind.REPORT or (_is_real(job) and job.kind is JobKind.EVALUATE):
        return 0, 0
    if _is_real(job):
        return REAL_STEPS, len((job.outcome or {}).get("losses", []))
    return steps(job.spec["base_model"]), sum(stint.beats for stint in worked)


def _loss_difference(outcomes: list[dict[str, Any]]) -> float:
    """The largest, at any step, between trains with one seed that began and went on at different steps."""
    curves = [[loss for _, loss, _ in outcome["losses"]] for outcome in outcomes]
    return max((max(at) - min(at) for at in zip(*curves, strict=False)), default=0.0)


def _real_broken(job: Job, storage: Storage) -> list[str]:
    """What a real trainer has made is whole: a loss for each step, an adapter that loads, all questions."""
    if not _is_real(job) or job.state is not JobState.SUCCEEDED:
        return []
    if job.kind is JobKind.EVALUATE:
        asked = job.outcome["questions"]
        return [] if asked == REAL_QUESTIONS else [f"{asked} questions instead of {REAL_QUESTIONS}"]
    at = [step for step, _, _ in job.outcome["losses"]]
    found = [] if at == list(range(1, REAL_STEPS + 1)) else [f"there are losses of the steps {at}"]
    try:
        adapter = load_file(Path(storage.address(job.outcome["folder"])) / "adapter" / "adapter_model.safetensors")
        untrained = [name for name, values in adapter.items() if "lora_B" in name and not values.any()]
        found += [f"not trained: {untrained}"] if untrained or not adapter else []
    except Exception as error:
        found.append(f"its adapter does not load: {error!r}")
    return found


def _lost(job: Job, storage: Storage, wanted: int, done: int) -> list[str]:
    """Every job ends, and what succeeded is there, whole, and was worked for."""
    if not job.state.final:
        return [f"it has not ended: attempt {job.attempt}, {job.message}"]
    if job.state is not JobState.SUCCEEDED:
        return []
    if job.kind is JobKind.REPORT:
        return [] if storage.exists(f"batches/{job.batch}/report.json") and job.outcome else ["there is no report"]
    folder = Path(storage.address(job.outcome["folder"]))
    found = [] if done >= wanted else [f"it has succeeded after {done} of {wanted} steps"]
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        found += [f"{name} is not what its manifest says" for name in files if not _is(folder / name, files[name])]
        name = "safetensors" if _is_real(job) else "txt"
        found += (
            [] if f"adapter/adapter_model.{name}" in files or job.kind is JobKind.EVALUATE else ["it has no adapter"]
        )
    except (OSError, ValueError, KeyError) as error:
        found.append(f"no manifest: {error!r}")
    if (adapter := job.spec.get("adapter_job")) and not _is_real(job):
        evaluated = job.outcome["adapter"]
        found += [] if evaluated == adapter else [f"it has evaluated {evaluated} instead of {adapter}"]
    return found


def _is(file: Path, entry: dict[str, Any]) -> bool:
    return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]


def _doubled(job: Job, store: Store) -> list[str]:
    """One final state, one success; each attempt was ended once, in order."""
    attempts = [end["attempt"] for end in job.history]
    successes = [end["state"] for end in job.history].count("succeeded")
    said = [event.text for event in store.events(job.id, "0", 0) if event.kind == "state"]
    found = []
    finals = [text for text in said if text.split(":")[0] in ("succeeded", "failed", "cancelled")]
    again = job.id.startswith("base-")  # submitted again after it had failed
    if len(finals) != 1 and not again:
        found.append(f"it has ended {len(finals)} times: {finals}")
    if successes != (job.state is JobState.SUCCEEDED):
        found.append(f"it has succeeded {successes} times")
    if attempts != list(range(1, job.attempt + 1)):
        found.append(f"attempt {job.attempt}, but those that ended are {attempts}")
    return found


def _first_claim(job: Job) -> float:
    return job.history[0]["claimed_at"] if job.history else float("inf")


def _disordered(job: Job, jobs: dict[str, Job]) -> list[str]:
    """Nothing runs before what it waits for has ended."""
    if job.kind is JobKind.REPORT:
        before = [other for other in jobs.values() if other.batch == job.batch and other.kind is not JobKind.REPORT]
    else:
        before = [jobs[job.spec["adapter_job"]]] if job.spec.get("adapter_job") else []
    return [f"it ran before {other.id} had ended" for other in before if other.ended_at > _first_claim(job)]


def _unexplained(job: Job, faults: list[Fault], hosts: set[str], jobs: dict[str, Job]) -> list[str]:
    """Ends without a cause."""
    found = []
    ends = job.history[:-1] if job.state is JobState.CANCELLED else job.history
    for end in ends:
        if end["state"] != "succeeded" and not any(_explains(fault, end, hosts) for fault in faults):
            what = f"{end['reason']}: {end['message']}"
            found.append(f"attempt {end['attempt']} on {end['worker']}: no cause for {what}")
    if job.state is JobState.CANCELLED:
        needed = jobs.get(job.spec.get("adapter_job") or "")
        asked = any(fault.kind == "cancel" and fault.job == job.id for fault in faults)
        if not (asked or (needed and needed.state in (JobState.FAILED, JobState.CANCELLED))):
            found.append(f"nobody cancelled it: {job.message}")
    return found


def _explains(fault: Fault, end: dict[str, Any], hosts: set[str]) -> bool:
    host = end["worker"].partition("/")[0]
    here = not fault.host or fault.host == host or host not in hosts
    over = (fault.ended or fault.began) + SLACK_S + (LEASE_S if fault.kind in SERVER | {"cut_off"} else 0)
    return (
        fault.kind in CAUSES.get(end["reason"], ())
        and here
        and fault.began <= end["ended_at"] + SLACK_S
        and end["claimed_at"] <= over
    )
