"""What is told of a batch's end, to whom, and how far that has come. gpu_worker/notifier.py tells it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from jobqueue.job import Batch, Job, WorkerInfo
    from jobqueue.results import BatchReport

WEBHOOK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What a webhook of the control workers' settings may be called."""
URL = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]+)?(/[!-~]*)?")
"""The form of an address that a sweep file may name: nothing in it that two parsers could read in two ways."""


def is_address(url: str) -> bool:
    """Whether an operator's URL is one to which can be posted."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:  # of a port that is none
        return False


def wrong_webhooks(webhooks: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with that setting, without a URL, which may hold a secret."""
    for name, url in webhooks.items():
        if not (WEBHOOK.fullmatch(name) and is_address(url)):
            yield f"webhooks: {name!r} must be a name without spaces, with an http(s) URL that has no user in it"


def wrong_command(command: str) -> Iterator[str]:
    """Likewise of the operator's command."""
    try:
        if not shlex.split(command):
            yield "on_batch_end is empty"
    except ValueError as error:
        yield f"on_batch_end: {error}"


def may_be_named(url: str) -> bool:
    """Whether that is an address that a sweep file may name, whatever its host."""
    return bool(URL.fullmatch(url)) and is_address(url)


def goes_to(url: str, hosts: Collection[str]) -> bool:
    """Whether that is such an address on one of these hosts (`HOST` or `HOST:PORT`)."""
    if not may_be_named(url):
        return False
    parts = urlsplit(url)
    return bool({parts.hostname, parts.netloc.lower()} & {host.lower() for host in hosts})


def unknown(notify: Sequence[str], workers: Sequence[WorkerInfo]) -> list[str]:
    """Whom no living control worker may tell of the batch's end."""
    known = {name for worker in workers if worker.alive for name in worker.webhooks}
    return [name for name in notify if name not in known and not goes_to(name, known)]


class Telling(StrEnum):
    DELIVERED = "delivered"
    RETRYING = "retrying"  # it failed, and will be tried again
    GIVEN_UP = "given_up"


@dataclass(frozen=True)
class Told:
    """One receiver of the news that a batch has ended."""

    target: str  # as the sweep file names it; or the operator's command
    state: Telling
    tries: int
    at: float  # of the last try, seconds since the epoch
    message: str = ""  # why it failed


def read_told(text: str | None) -> tuple[Told, ...]:
    """What `write_told` made."""
    return tuple(Told(**{**each, "state": Telling(each["state"])}) for each in json.loads(text or "[]"))


def write_told(told: Sequence[Told]) -> str:
    return json.dumps([asdict(each) for each in told])


def payload(batch: Batch, jobs: Sequence[Job], report: str) -> dict[str, Any]:
    """What a receiver gets, as JSON can hold it; `text` is what Slack and Mattermost show.

    `report` is where the report lies, for those who can read the storage.
    """
    from jobqueue.job import JobKind, JobState
    from jobqueue.results import BatchReport

    made = next((job.outcome for job in jobs if job.kind is JobKind.REPORT and job.state is JobState.SUCCEEDED), None)
    found = None
    with suppress(ValueError):  # of another release
        found = BatchReport.from_dict(made) if made else None
    ended_at = max(job.ended_at for job in jobs if job.batch == batch.name)
    makespan_s = round(ended_at - batch.submitted_at, 3)
    states = {state.value: count for state, count in batch.states.items()}
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    verdict = found.verdict if found else ""
    return {
        "event": "batch_ended",
        "batch": batch.name,
        "owner": batch.owner,
        "state": batch.state.value,
        "states": states,
        "base_model": batch.base_model,
        "trials": batch.trials,
        "best": _best(found) if found else None,
        "verdict": verdict,
        "submitted_at": batch.submitted_at,
        "ended_at": ended_at,
        "makespan_s": makespan_s,
        "report": report if found else None,
        "text": _escaped(f"{batch.name} has ended after {_duration(makespan_s)}: {counts}. {verdict}".strip()),
    }


def _best(report: BatchReport) -> dict[str, Any] | None:
    """The trial with the highest accuracy; None where no trial has one."""
    metric = report.metric
    best = next((trial for trial in report.trials if metric in trial.scores), None)
    if best is None or metric is None:
        return None
    return {
        "trial": best.label,
        "job": best.job,
        "metric": metric,
        "accuracy": best.scores[metric].accuracy,
        "versus_base_points": best.versus_base.points if best.versus_base else None,
        "finding": best.versus_base.finding if best.versus_base else None,
    }


def _escaped(text: str) -> str:
    """As Slack wants it: else a label could call everybody of a channel (`<!channel>`)."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes} min" if minutes < 60 else f"{seconds / 3600:.1f} h"
