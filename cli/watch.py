"""`loraq watch`: follow a batch to its end, also through a server's restart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from cli import complete
from cli.main import connect

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from cli.render import Section
    from jobqueue.job import Batch, Job
    from jobqueue.service import Client

T = TypeVar("T")

LOOK_S = 1.0
"""How often a watched batch is looked at."""
RETRY_S = 2.0
"""How long to wait before a server that did not answer is asked again."""
REMIND_S = 30.0
"""How often a running job's progress is printed where there is no display to refresh."""


class Patience:
    """Makes calls until the server answers them; says once that it waits, and once that it goes on."""

    def __init__(self, notes: Console) -> None:
        self._notes = notes
        self._waiting = False

    def __call__(self, call: Callable[[], T]) -> T:
        from jobqueue.errors import ServerError

        while True:
            try:
                answer = call()
            except ServerError as error:
                if not self._waiting:
                    what = error.what.rstrip(".")
                    self._notes.print(f"{what}; waiting for the server (ctrl-C ends).", style="yellow")
                self._waiting = True
                time.sleep(RETRY_S)
                continue
            if self._waiting:
                self._notes.print("The server answers again.", style="yellow")
            self._waiting = False
            return answer


@click.command()
@click.argument("batch", shell_complete=complete.batches)
def watch(batch: str) -> None:
    """Follow a batch until it has ended.

    Ctrl-C ends the watching only: the batch goes on.
    """
    from cli.render import console

    out = console()
    ended = watch_batch(connect(), batch, out)
    if f"{batch}.report" in ended.jobs:
        out.print(f"`loraq results {batch}` compares its trials.")


def watch_batch(client: Client, name: str, out: Console) -> Batch:
    """Follow a batch that goes on without the one who follows it."""
    try:
        return follow_batch(client, name, out)
    except KeyboardInterrupt:
        out.print(f"\n{name} goes on. `loraq watch {name}` follows it again, `loraq cancel {name}` stops it.")
        raise


def follow_batch(client: Client, name: str, out: Console) -> Batch:
    """Show a batch's progress until its last job has ended.

    On a terminal there is a line per running job, refreshed; elsewhere a line per change of state.
    """
    from cli.render import console, counts
    from jobqueue.job import JobState

    client.batch(name)  # a wrong name, or no server at all, is an error and nothing to wait for
    # The display shares a terminal with nobody: what is said beside it goes through it
    patience = Patience(out if out.is_terminal else console(stderr=True))
    follow = _follow_on_terminal if out.is_terminal else _follow_in_lines
    follow(out, _looks(client, name, patience))
    batch = patience(lambda: client.batch(name))
    why = "" if batch.state is JobState.SUCCEEDED else f" `loraq show {name}` says why."
    out.print(f"{name} has ended: {counts(batch.states)}.{why}")
    return batch


def _looks(client: Client, name: str, patience: Patience) -> Iterator[list[Job]]:
    """The jobs of a batch, again and again, last when all have ended."""
    while True:
        jobs = patience(lambda: client.jobs(name))
        yield jobs
        if all(job.state.final for job in jobs):
            return
        time.sleep(max(LOOK_S, len(jobs) / 200))  # a batch of thousands is much to read


def _follow_in_lines(out: Console, looks: Iterator[list[Job]]) -> None:
    from cli.render import counts, progress
    from jobqueue.job import JobState

    changes = _Changes()
    said: dict[str, float] = {}
    for jobs in looks:
        if changes.first:
            out.print(counts(Counter(job.state for job in jobs)))
        for job, text in changes.since(jobs):
            out.print(f"{job.id}: {text}")
            said[job.id] = time.monotonic()
        for job in jobs:
            if job.state is JobState.RUNNING and job.progress and time.monotonic() - said.get(job.id, 0.0) > REMIND_S:
                out.print(f"{job.id}: {progress(job.progress)}")
                said[job.id] = time.monotonic()


def _follow_on_terminal(out: Console, looks: Iterator[list[Job]]) -> None:
    from rich.live import Live
    from rich.text import Text

    changes = _Changes()
    with Live(Text(""), console=out, auto_refresh=False, transient=True) as live:
        for jobs in looks:
            for job, text in changes.since(jobs):
                if job.state.final:
                    out.print(f"{job.id}: {text}", style="red" if job.message else "green")
            live.update(running_table(out, jobs), refresh=True)


class _Changes:
    """What has happened to the jobs of a batch since the last look."""

    def __init__(self) -> None:
        self.first = True
        self._seen: dict[str, tuple[object, ...]] = {}

    def since(self, jobs: Sequence[Job]) -> list[tuple[Job, str]]:
        """The jobs that changed, and how; at the first look, those that are at work."""
        from jobqueue.job import JobState

        changed = []
        for job in jobs:
            now = (job.state, job.attempt, job.cancel_requested)
            if self._seen.get(job.id) != now and not (self.first and job.state is not JobState.RUNNING):
                changed.append((job, _happened(job)))
            self._seen[job.id] = now
        self.first = False
        return changed


def _happened(job: Job) -> str:
    """A job's change of state in words."""
    from cli.render import duration, state
    from jobqueue.job import JobState

    text = state(job).plain
    if job.state is JobState.RUNNING:
        again = f", attempt {job.attempt}" if job.attempt > 1 else ""
        return f"{text} on {job.worker}{again}"
    if job.state is JobState.QUEUED and job.attempt:
        return f"queued again ({job.reason}): {job.message}" if job.reason else "queued again"
    took = f" after {duration(job.seconds)}" if job.state is JobState.SUCCEEDED and job.seconds else ""
    return f"{text}{took}: {job.message}" if job.message else text + took


def running_cells(jobs: Sequence[Job], now: float, *, everywhere: bool = False, bars: bool = True) -> Section:
    """One row per running job, of one batch or of everywhere; `now` is in seconds since the epoch."""
    from rich.text import Text

    from cli.render import Column, bar, duration, number, of_memory, state, step
    from jobqueue.overview import left_s

    columns = [
        Column("job"),
        Column("trial", cut=16, rank=12) if everywhere else Column("trial", wrap=True, rank=5),
        Column("phase"),
        Column("", rank=10),
        Column("step", right=True, rank=1),
        Column("loss", right=True, rank=3),
        Column("tokens/s", right=True, rank=7),
        Column("memory", right=True, rank=6),
        Column("took", right=True, rank=9),
        Column("left", right=True, rank=2),
        Column("worker", rank=4 if everywhere else 8),
        Column("owner", rank=8 if everywhere else 11),
    ]
    rows: list[list[RenderableType]] = []
    for job in jobs:
        p = job.progress
        phase = state(job) if job.cancel_requested else Text(str(p.get("phase", "start")))
        done = bar(p.get("step") or 0, p["steps"]) if bars and p.get("steps") else ""
        loss = number(p.get("loss"), 3) if p.get("loss") is not None else ""
        tokens = number(p.get("tokens_per_s")) if p.get("tokens_per_s") else ""
        held = of_memory(p.get("peak_bytes") or p.get("reserved_bytes"), p.get("promised_bytes"))
        left = duration(left_s(p)) if left_s(p) is not None else ""
        took = duration(now - job.claimed_at)
        rows.append([job.id, job.trial, phase, done, step(p), loss, tokens, held, took, left, job.worker, job.owner])
    return columns, rows


def running_table(out: Console, jobs: Sequence[Job]) -> RenderableType:
    """One line per running job of a batch, and how many there are of the others."""
    from rich.console import Group
    from rich.text import Text

    from cli.render import counts, table
    from jobqueue.job import JobState

    columns, rows = running_cells([job for job in jobs if job.state is JobState.RUNNING], time.time())
    room = max(1, out.height - 4)
    more = [Text(f"and {len(rows) - room} more running", "dim")] if len(rows) > room else []
    summary = Text(counts(Counter(job.state for job in jobs)), "bold")
    return Group(*([table(out, columns, rows[:room])] if rows else []), *more, summary)
