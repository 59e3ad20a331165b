"""`loraq hold, release, retry, rm, drain, undrain, workers`: who runs what, when, and once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from cli import complete
from cli.main import connect

if TYPE_CHECKING:
    from rich.console import RenderableType

    from jobqueue.job import Job, WorkerInfo

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


Target = TypeVar("Target")


def each(targets: Sequence[str], act: Callable[[str], Target]) -> Iterator[tuple[str, Target]]:
    """Does the same to each target; all that there is not is said at the end, when the others are done."""
    from jobqueue.errors import NotFoundError

    unknown: list[NotFoundError] = []
    for target in targets:
        try:
            yield target, act(target)
        except NotFoundError as error:
            unknown.append(error)
    if unknown:
        raise NotFoundError("\n".join(error.what for error in unknown), unknown[0].do)


def _jobs(targets: Sequence[str], act: Callable[[str], list[Job]], done: str, nothing: str, as_json: bool) -> None:
    """Does the same to each target and says which jobs it changed."""
    from cli.render import console, counted, print_json
    from jobqueue.memory import all_classes

    changed: list[Job] = []
    try:
        for target, jobs in each(targets, act):
            changed += jobs
            said = f"{counted(len(jobs), 'job')} {done}" if jobs else nothing
            if target in all_classes():
                said = f"the class is {done}"
            if not as_json:
                console().print(f"{target}: {said}.")
    finally:
        if as_json:
            print_json(changed)


@click.command()
@click.argument("targets", metavar="BATCH|JOB|CLASS...", nargs=-1, required=True, shell_complete=complete.jobs)
@as_json_option
def hold(targets: tuple[str, ...], as_json: bool) -> None:
    """Keep jobs, batches or a memory class from being started.

    Until they are released. What runs goes on. CLASS is one of gpu8, gpu16, gpu24, gpu48, gpu80, gpu141, gpu-large
    and cpu.
    """
    _jobs(targets, connect().hold, "held", "nothing is left to hold", as_json)


@click.command()
@click.argument("targets", metavar="BATCH|JOB|CLASS...", nargs=-1, required=True, shell_complete=complete.jobs)
@as_json_option
def release(targets: tuple[str, ...], as_json: bool) -> None:
    """End a hold."""
    _jobs(targets, connect().release, "released", "nothing was held", as_json)


@click.command()
@click.argument("targets", metavar="BATCH|JOB...", nargs=-1, required=True, shell_complete=complete.jobs)
@click.option("--failed", is_flag=True, help="Only what failed: what was cancelled stays so.")
@as_json_option
def retry(targets: tuple[str, ...], failed: bool, as_json: bool) -> None:
    """Run again what failed or was cancelled: of a batch, or one job with what waited for it.

    Training goes on from the newest checkpoint, where there is one. The results are made anew. What has succeeded
    is left as it is; `loraq submit --again` trains it once more.
    """
    client = connect()
    nothing = "nothing has failed" if failed else "nothing has failed or was cancelled"
    _jobs(targets, lambda target: client.retry(target, failed_only=failed), "to be run again", nothing, as_json)


@click.command()
@click.argument("names", metavar="BATCH...", nargs=-1, required=True, shell_complete=complete.batches)
@click.option("--files", is_flag=True, help="Also what it has in the storage: adapters, logs, scores.")
def rm(names: tuple[str, ...], files: bool) -> None:
    """Forget batches that have ended.

    Their records leave the server; adapters, logs and scores stay in the storage unless --files is given.
    """
    from cli.render import console

    client = connect()
    for name, found in each(names, lambda name: client.remove(name, files=files)):
        with_files = ", with its files" if found else f"; of its files there is none in {client.storage.url}"
        console().print(f"{name}: removed{with_files if files else ''}.", soft_wrap=True)


@click.command()
@click.argument("targets", metavar="WORKER|HOST...", nargs=-1, required=True, shell_complete=complete.workers)
@as_json_option
def drain(targets: tuple[str, ...], as_json: bool) -> None:
    """Empty a worker, or all workers of a host.

    Running jobs are saved and go on elsewhere, which costs them no failure. The workers stay, and take nothing until
    `loraq undrain`.
    """
    _mark(targets, False, as_json)


@click.command()
@click.argument("targets", metavar="WORKER|HOST...", nargs=-1, required=True, shell_complete=complete.workers)
@as_json_option
def undrain(targets: tuple[str, ...], as_json: bool) -> None:
    """Let drained workers take jobs again."""
    _mark(targets, True, as_json)


def _mark(targets: Sequence[str], undo: bool, as_json: bool) -> None:
    from cli.render import console, counted, print_json

    client = connect()
    meant: list[WorkerInfo] = []
    for target, found in each(targets, lambda target: client.drain(target, undo=undo)):
        meant += found
        if not as_json:
            word = "may take jobs again" if undo else "told to drain, within seconds"
            console().print(f"{target}: {counted(len(found), 'worker')} {word}.")
    if as_json:
        print_json(meant)


@click.command()
@as_json_option
def workers(as_json: bool) -> None:
    """List the workers, what they run, and why one takes nothing."""
    from cli.render import Column, age, console, memory, print_json, table, worker_state

    client = connect()
    seen = client.overview(most=0)
    found, held = seen.workers, seen.held_classes
    for warning in client.warnings():
        console(stderr=True).print(f"warning: {warning}", style="yellow")
    if as_json:
        print_json(found)
        return
    if not found:
        console().print("There is no worker; `loraq worker` on a GPU host, or `loraq up`, starts one.")
        return
    columns = [
        Column("worker"),
        Column("device", rank=2),
        Column("memory", right=True, rank=3),
        Column("slots", rank=4),
        Column("state", wrap=True),
        Column("running", wrap=True),
        Column("seen", right=True, rank=1),
    ]
    rows: list[list[RenderableType]] = []
    for worker in found:
        usable = memory(worker.usable_bytes) if worker.usable_bytes else ""
        slots = f"{worker.slots} {worker.share}" if worker.slots > 1 else str(worker.slots)
        running, seen_at = " ".join(worker.running), age(worker.seen_at)
        rows.append([worker.id, worker.device, usable, slots.strip(), worker_state(worker), running, seen_at])
    console().print(table(console(), columns, rows))
    if held:
        console().print(f"Held, so that nothing of it starts: {', '.join(held)} (`loraq release`).", style="yellow")
