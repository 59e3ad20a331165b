"""`loraq logs`: what a job has printed, and prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import click

from cli import complete
from cli.main import connect
from cli.watch import REMIND_S, Patience
from jobqueue.errors import NotFoundError

if TYPE_CHECKING:
    from rich.console import Console

    from jobqueue.events import Event
    from jobqueue.job import Job
    from jobqueue.service import Client

BLOCK_S = 2.0
"""How long one call waits for a log line."""


@click.command()
@click.argument("job", shell_complete=complete.jobs)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last so many lines.")
def logs(job: str, follow: bool, lines: int | None) -> None:
    """Show what a job has printed.

    A new attempt and each change of state is marked. With -f the job's progress is shown too, and a
    server that restarts is waited for: no line is missing or comes twice.
    """
    from cli.render import console

    client = connect()
    found = client.job(job)
    printer = LogPrinter(console(), with_progress=follow)
    past = list(_stored(client, job))
    for event in past[_start(past, lines) :]:
        printer.print(event)
    if not past and (file := _file(found)):
        raise NotFoundError(f"{job} ended long ago: what it printed has left the server", f"The storage has it: {file}")
    if not past:
        click.echo(f"{job} is {client.job(job).state}: it has printed nothing.", err=True)
    if follow:
        for event in coming(client, job, past[-1].id if past else "0", Patience(console(stderr=True))):
            printer.print(event)


def _file(job: Job) -> str:
    """Where the storage has what an ended job has printed; "" where it has not run, or prints nothing."""
    from jobqueue.archive import log_file
    from jobqueue.job import JobKind

    ran = job.state.final and job.attempt and job.kind is not JobKind.REPORT
    return log_file(job) if ran else ""


def _stored(client: Client, job_id: str, after: str = "0") -> Iterator[Event]:
    """Everything that is in the job's stream by now."""
    while events := client.events(job_id, after):
        yield from events
        after = events[-1].id


def _start(events: Sequence[Event], lines: int | None) -> int:
    """Where the last `lines` log lines begin."""
    if lines is None:
        return 0
    newest_first = (i for i in range(len(events) - 1, -1, -1) if events[i].kind == "log")
    last = list(islice(newest_first, lines))
    return last[-1] if last else len(events)


def coming(client: Client, job_id: str, after: str, patience: Patience) -> Iterator[Event]:
    """The entries after that one as they come, until the job has ended and its stream is read to the end."""
    ended = False
    while True:
        block_s = 0.0 if ended else BLOCK_S
        events = patience(lambda after=after, block_s=block_s: client.events(job_id, after, block_s))  # type: ignore[misc]
        yield from events
        if events:
            after = events[-1].id
        elif ended:
            return
        if not events or any(event.kind == "state" for event in events):
            ended = patience(lambda: client.job(job_id)).state.final


class LogPrinter:
    """Prints a job's entries: log lines as they are, the rest dim."""

    def __init__(self, out: Console, *, with_progress: bool) -> None:
        self._out = out
        self._with_progress = with_progress
        self._attempt = 0
        self._progress: tuple[object, float] = ("", 0.0)  # phase and time of the last one that was printed

    def print(self, event: Event) -> None:
        from rich.text import Text

        from cli.render import clock, progress

        attempt = f"attempt {event.attempt}" if event.attempt else ""
        if event.attempt != self._attempt and event.kind != "state":  # a long stream has lost its beginning
            self._mark(f"--- {attempt} ---")
        self._attempt = event.attempt
        if event.kind == "log":
            # Colours of the trainer's own are kept for a terminal; no other control code gets through.
            self._out.print(Text.from_ansi(event.text), soft_wrap=True)
        elif event.kind == "state":
            self._mark(f"--- {clock(event.at)} {': '.join(filter(None, (attempt, event.text)))} ---")
        elif event.kind == "progress" and self._with_progress:
            phase, at = self._progress
            if event.data.get("phase") != phase or event.at - at >= REMIND_S:
                self._progress = (event.data.get("phase"), event.at)
                self._mark(f"--- {clock(event.at)} {progress(event.data)} ---")

    def _mark(self, text: str) -> None:
        self._out.print(text, style="dim", soft_wrap=True)
