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
from jobs import steps

from jobqueue.job import Job, JobKind, JobState
from jobqueue.storage import Storage, job_folder
from jobqueue.store import Store

SLACK_S = 1.0  # between the driver's note of a fault and what the server's clock says of its effect
SERVER = {"server_kill", "server_stop", "client_kill"}
HOST_DOWN = {"supervisor_kill", "celery_kill", "worker_stop_short", "worker_stop_long", "worker_stop_then_kill"}
CAUSES = {
    "crashed": {"trainer_kill", "guardian_kill", "storage_away"},
    "lost": SERVER | HOST_DOWN | {"drain", "memory_full"},
    "storage": {"storage_away"},
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


def stints(file: Path) -> list[Stint]:
    """Of one job, by their begin. A last line that kill -9 cut off does not count."""
    times: dict[int, list[float]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        words = line.split()
        if len(words) == 2:
            times.setdefault(int(words[0]), []).append(float(words[1]))
    found = [Stint(pid, min(at), max(at), len(at)) for pid, at in times.items()]
    return sorted(found, key=lambda stint: stint.began)


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
    for job in jobs:
        worked = stints(run.folder / "beats" / job.id)
        wanted = 0 if job.kind is JobKind.REPORT else steps(job.spec["base_model"])
        done = sum(stint.beats for stint in worked)
        made = Path(storage.address(job_folder(job.id, job.batch)))
        checks = {
            "lost": _lost(job, storage, wanted, done),
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
            totals["steps_cancelled"] += done
        else:
            totals["steps_done"] += done
            totals["steps_wasted"] += done - wanted if job.state is JobState.SUCCEEDED else done
        verdict.jobs.append([job.id, job.state.value, job.reason, job.attempt, job.failures, wanted, done])
    verdict.figures = {
        "jobs": len(jobs),
        "faults": len(run.faults),
        **{name: totals[name] for name in ("lost", "doubled", "overlapping", "disordered", "unexplained")},
        "wasted_share": round(totals["steps_wasted"] / max(1, totals["steps_done"]), 4),
        "succeeded": totals[JobState.SUCCEEDED],
        "failed_at_cap": totals[JobState.FAILED],
        "cancelled": totals[JobState.CANCELLED],
        **{name: totals[name] for name in ("attempts", "published_twice", "steps_done", "steps_cancelled")},
    }
    return verdict


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
        found += [] if "adapter/adapter_model.txt" in files else ["it has no adapter"]
    except (OSError, ValueError, KeyError) as error:
        found.append(f"no manifest: {error!r}")
    if adapter := job.spec.get("adapter_job"):
        text = (Path(job.outcome["adapter"]) / "adapter_model.txt").read_text()
        found += [] if text == adapter else [f"it has evaluated {text} instead of {adapter}"]
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
    over = (fault.ended or fault.began) + SLACK_S + (LEASE_S if fault.kind in SERVER else 0)
    return (
        fault.kind in CAUSES.get(end["reason"], ())
        and here
        and fault.began <= end["ended_at"] + SLACK_S
        and end["claimed_at"] <= over
    )
