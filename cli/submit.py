"""`loraq submit`: a sweep file into the queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.main import connect

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from jobqueue.plan import Plan
    from jobqueue.service import Client, UploadProgress


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the file, e.g. training.max_steps=20. May be given several times.",
)
@click.option("--dry-run", is_flag=True, help="Show the jobs and submit nothing; needs no server.")
@click.option("--wait", is_flag=True, help="Follow the batch, then show its results; exit code 10 if a job failed.")
@click.option("--force", is_flag=True, help="Submit also where no live worker is big enough.")
@click.option("--again", is_flag=True, help="Make another batch of what was submitted before.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def submit(
    file: Path, sets: tuple[str, ...], dry_run: bool, wait: bool, force: bool, again: bool, as_json: bool
) -> None:
    """Put the fine-tunes of a sweep file into the queue.

    Every mistake in FILE is reported at once, with its line, before anything is submitted. The same file with the
    same data, submitted twice, is one batch.
    """
    from cli.render import console, counted, print_json
    from jobqueue.notification import unknown
    from jobqueue.steering import RETRIED

    client = connect()
    plan = client.plan(client.read(file, sets))
    notes = console(stderr=True)
    for warning in (*plan.warnings, *plan.advice):
        notes.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if dry_run:
        _show_plan(plan, as_json)
        return
    for warning in client.warnings():
        notes.print(f"warning: {warning}", style="yellow")
    known = None if again else client.find(plan)
    with _upload_bar(notes) as progress:
        batch = client.submit(plan, force=force, again=again, progress=progress)
    if known:
        retry = f"`loraq retry {batch.name}` runs again what did not succeed, " if batch.state in RETRIED else ""
        advice = f"{retry}--again makes another batch."
        notes.print(f"{batch.name} is that already ({batch.state}); {advice}", style="yellow", soft_wrap=True)
    workers = client.workers() if not batch.ended else []
    alive = [w for w in workers if w.alive and w.trains]
    if not batch.ended and not alive:
        notes.print("warning: no worker that trains is alive; the jobs wait for one", style="yellow", soft_wrap=True)
    elif alive and all(w.note.startswith(("drained", "sick")) for w in alive):
        text = "warning: no worker takes a job now; `loraq workers` says why"
        notes.print(text, style="yellow", soft_wrap=True)
    for name in unknown(plan.sweep.notify, workers) if not batch.ended else ():
        what = "is not of LORAQ_WEBHOOK_HOSTS" if "://" in name else "is none of LORAQ_WEBHOOKS"
        text = f"warning: {name} {what} of any living control worker; it would not be told that the batch has ended"
        notes.print(text, style="yellow", soft_wrap=True)
    if wait:
        _wait(client, batch.name, as_json)
    elif as_json:
        print_json(batch)
    elif not known:
        out = console()
        out.print(f"Submitted {batch.name}: {counted(len(batch.jobs), 'job')} for {counted(batch.trials, 'trial')}.")
        out.print(f"  loraq watch {batch.name}    to follow it", style="dim")
        out.print(f"  loraq results {batch.name}  to see which trial is best", style="dim")


@contextmanager
def _upload_bar(notes: Console) -> Iterator[UploadProgress]:
    """Shows how far files are that go through the server; they can be large, and the way slow."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        tasks: dict[Path, TaskID] = {}

        def progress(file: Path, arrived: int, size: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(f"sending {file.name}", total=size)
            bar.update(tasks[file], completed=arrived)

        yield progress


def _show_plan(plan: Plan, as_json: bool) -> None:
    from cli.render import Column, console, counted, memory, print_json, table

    if as_json:
        warnings = (*plan.warnings, *plan.advice)
        print_json({"name": plan.sweep.name, "file": plan.sweep.file, "jobs": plan.jobs, "warnings": warnings})
        return
    out = console()
    columns = [
        Column("id"),
        Column("kind", below="id"),
        Column("trial", wrap=True),
        Column("waits for", wrap=True, rank=2),
        Column("memory", right=True, rank=1, below="trial"),
    ]
    rows = []
    for job in plan.jobs:
        need = "" if job.kind.control else memory(job.need_bytes) if job.need_bytes else "by a worker"
        rows.append([job.id, job.kind, job.trial, _few(job.after), need])
    out.print(table(out, columns, rows))
    votes = [ensemble.name for ensemble in plan.sweep.ensembles if ensemble.method == "vote"]
    if votes:
        out.print(f"\nThe report counts the votes of {', '.join(votes)}.")
    trials = counted(len(plan.sweep.trials), "trial")
    out.print(f"\n{plan.sweep.name}: {counted(len(plan.jobs), 'job')} for {trials}. Nothing was submitted.")


def _few(ids: tuple[str, ...]) -> str:
    """The report waits for everything: no list of a hundred."""
    return " ".join(ids) if len(ids) <= 3 else f"{ids[0]} and {len(ids) - 1} more"


def _wait(client: Client, name: str, as_json: bool) -> None:
    """Follow the batch to its end, show its results, and fail if it did."""
    from cli.render import console
    from cli.results import print_report
    from cli.watch import watch_batch
    from jobqueue.errors import BatchFailedError
    from jobqueue.job import JobState

    batch = watch_batch(client, name, console(stderr=as_json))
    print_report(client.report(name), "json" if as_json else "table")
    if batch.state is not JobState.SUCCEEDED:
        raise BatchFailedError(
            f"Batch {name} did not succeed: not all of its jobs did.",
            f"See `loraq ls {name}` for which, and `loraq logs JOB` for why.",
        )
