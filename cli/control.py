"""`loraq ls` and `loraq cancel`: what there is, and how to stop it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cli import complete
from cli.main import connect
from cli.steer import each

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from jobqueue.job import Batch, Job


@click.command()
@click.argument("batch", required=False, shell_complete=complete.batches)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ls(batch: str | None, as_json: bool) -> None:
    """List batches, or the jobs of one.

    Without BATCH the newest batch comes first.
    """
    from cli.render import console, print_json
    from jobqueue.view import NEWEST

    client = connect()
    if batch is not None:
        jobs = client.jobs(batch)
        if as_json:
            print_json(jobs)
        else:
            print_jobs(console(), jobs)
        return
    batches = client.batches()
    if as_json:
        print_json(batches)
    elif batches:
        _print_batches(console(), batches)
        if len(batches) == NEWEST:
            console().print(f"Only the newest {NEWEST} are shown; `loraq rm` removes what has ended.", style="dim")
    else:
        console().print("There is no batch yet; `loraq submit FILE` makes one.")


def _print_batches(out: Console, batches: Sequence[Batch]) -> None:
    from cli.render import Column, age, batch_state, table

    columns = [
        Column("batch"),
        Column("state"),
        Column("trials", right=True, rank=2),
        Column("done", right=True),
        Column("owner", rank=4),
        Column("age", right=True, rank=1),
        Column("base model", rank=3),
    ]
    rows: list[list[RenderableType]] = []
    for batch in batches:
        done = sum(count for each, count in batch.states.items() if each.final)
        of_all = f"{done}/{sum(batch.states.values())}"
        name, state, trials = batch.name, batch_state(batch.state), str(batch.trials)
        rows.append([name, state, trials, of_all, batch.owner, age(batch.submitted_at), batch.base_model])
    out.print(table(out, columns, rows))


def print_jobs(out: Console, jobs: Sequence[Job]) -> None:
    """The jobs of a batch, one line each."""
    from cli.render import Column, duration, memory, step, table
    from cli.render import state as state_text

    columns = [
        Column("job"),
        Column("kind", rank=5),
        Column("state"),
        Column("trial", wrap=True, rank=2),
        Column("step", right=True, rank=1),
        Column("took", right=True, rank=3),
        Column("memory", right=True, rank=4),
        Column("attempts", right=True, rank=6),
        Column("worker", rank=7),
    ]
    rows: list[list[RenderableType]] = []
    for job in jobs:
        took = duration(job.seconds) if job.seconds else ""
        need = memory(job.need_bytes) if job.need_bytes else ""
        rows.append(
            [
                job.id,
                job.kind,
                state_text(job),
                job.trial,
                step(job.progress),
                took,
                need,
                str(job.attempt),
                job.worker,
            ]
        )
    out.print(table(out, columns, rows))


@click.command()
@click.argument("targets", metavar="BATCH|JOB...", nargs=-1, required=True, shell_complete=complete.jobs)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def cancel(targets: tuple[str, ...], as_json: bool) -> None:
    """Stop batches or jobs.

    Jobs that wait are cancelled at once; running ones are told to stop, and end within seconds.
    """
    from cli.render import console, counted, print_json

    client = connect()
    out = console()
    stopped: list[Job] = []
    try:
        for target, asked in each(targets, client.cancel):
            stopped += asked
            if not as_json:
                what = f"{counted(len(asked), 'job')} stopped or told to stop" if asked else "nothing left to stop"
                out.print(f"{target}: {what}.")
    finally:
        if as_json:
            print_json(stopped)
