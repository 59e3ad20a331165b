"""`loraq pull`: a trial's adapter, and what else it has left, to this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from cli import complete
from cli.main import connect

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from jobqueue.pull import Part, Pull, Pulled
    from jobqueue.service import Client, PullProgress

WHAT = ("adapter", "log", "scores", "export", "all")


@click.command()
@click.argument("trial", metavar="BATCH/TRIAL", shell_complete=complete.batches_and_trials)
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--best", is_flag=True, help="Of a BATCH: its best trial that has an adapter, as `loraq results` has it.")
@click.option("--all", "every", is_flag=True, help="Of a BATCH: all trials, each in a folder of its own below TARGET.")
@click.option(
    "--what",
    multiple=True,
    type=click.Choice(WHAT),
    help="Which part; may be given several times. adapter where it is left out.",
)
@click.option("--force", is_flag=True, help="Replace other files that are in TARGET.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; with --all a list.")
def pull(
    trial: str, target: Path | None, best: bool, every: bool, what: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Copy a trial's adapter to this machine.

    TARGET is BATCH-TRIAL where it is left out, and `PeftModel.from_pretrained` takes it. Where this machine cannot read
    the storage, a control worker sends the files through the server. They appear when all have arrived and were
    checked; what was interrupted goes on with the same command, and what is there is not copied again. A BATCH alone
    will do where it has one trial.

    Parts: adapter (of `method: full` the model), with its tokenizer; log: logs/, what the jobs have printed and
    experiment trackers have written; scores: scores/, every answer to every question, the base model's too; export:
    merged_16bit/ and gguf/; all: what there is of them.

    \b
    loraq pull medqa-rank/2
    loraq pull medqa-rank --best ./adapter
    loraq pull medqa-rank --all ./adapters --what adapter --what scores
    """
    from cli.render import console, print_json
    from jobqueue.pull import PARTS

    if best and every:
        raise click.UsageError("--best and --all exclude each other.")
    if "/" in trial and (best or every):
        raise click.UsageError(f"{trial} is a trial; --best and --all are of a BATCH.")
    parts: Sequence[Part] = PARTS if "all" in what else cast("tuple[Part, ...]", what)
    client, notes = connect(), console(stderr=True)
    with _looking(notes, trial):
        if every:
            pulls = _of_all(client, trial, target or Path(), parts, force, notes)
        else:
            name = _best(client, trial, notes) if best else _only(client, trial)
            pulls = [client.plan_pull(name, target, what=parts, force=force)]
    with _bar(notes) as progress:
        done = client.pull(*pulls, progress=progress)
    if as_json:
        documents = [_document(pulled) for pulled in done]
        print_json(documents if every else documents[0])
    else:
        for pulled in done:
            _print(console(), pulled)


def _best(client: Client, batch: str, notes: Console) -> str:
    from jobqueue.pull import best_of

    report = client.report(batch)
    name, better = best_of(report, client.jobs(batch))
    so_far = "" if report.complete else " so far: the batch is still at work"
    notes.print(f"{name} is the best trial{so_far}.", soft_wrap=True)
    if better:
        notes.print(f"Better, but without an adapter: {', '.join(better)}.", style="yellow", soft_wrap=True)
    return name


def _only(client: Client, name: str) -> str:
    """What is named where it is a trial, else the batch's only one. Raises UsageError where it has several."""
    from jobqueue.asking import TRIAL
    from jobqueue.errors import NotFoundError
    from jobqueue.pull import trials_of

    if "/" in name:
        return name
    try:
        trials = trials_of(client.jobs(name))
    except NotFoundError:
        if TRIAL.fullmatch(name):  # demo.2
            return name
        raise
    if len(trials) != 1:
        one = f"Name one, as in {trials[0]}, or take" if trials else "Take"
        raise click.UsageError(f"{name} has {len(trials)} trials. {one} --best or --all.")
    return trials[0]


def _of_all(client: Client, batch: str, below: Path, what: Sequence[Part], force: bool, notes: Console) -> list[Pull]:
    """Of each trial that has it. Raises NotFoundError where none has."""
    from jobqueue.errors import NotFoundError
    from jobqueue.pull import trials_of

    pulls, none = [], NotFoundError(f"{batch} has no trial", f"See `loraq ls {batch}`.")
    for name in trials_of(client.jobs(batch)):
        try:
            pulls.append(client.plan_pull(name, below / name.replace("/", "-"), what=what, force=force))
        except NotFoundError as error:
            none = error
            notes.print(f"{error.what}.", style="yellow", soft_wrap=True)
    if not pulls:
        raise none
    return pulls


@contextmanager
def _looking(notes: Console, name: str) -> Iterator[None]:
    """Says on a terminal what takes so long, where a control worker has to be asked."""
    if notes.is_terminal:
        with notes.status(f"Looking for {name}"):
            yield
    else:
        yield


@contextmanager
def _bar(notes: Console) -> Iterator[PullProgress]:
    """Shows on a terminal how far each trial is, and anywhere, once, why nothing comes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    said = ""
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:

        def progress(trial: str, there: int, size: int, why: str) -> None:
            nonlocal said
            if trial not in tasks:
                tasks[trial] = bar.add_task(trial, total=size, completed=there)
            bar.update(tasks[trial], completed=there)
            if why and why != said:
                notes.print(f"{why}; waiting (ctrl-C ends).", style="yellow", soft_wrap=True)
            said = why

        try:
            yield progress
        except KeyboardInterrupt:
            bar.stop()
            notes.print("Stopped. The same command goes on from there.", style="yellow")
            raise


def _document(pulled: Pulled) -> dict[str, Any]:
    files = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in pulled.files}
    return {**vars(pulled), "files": files}


def _print(out: Console, pulled: Pulled) -> None:
    from rich.filesize import decimal

    from cli.render import counted

    what = f"{counted(len(pulled.files), 'file')}, {decimal(pulled.bytes)}"
    done = f"{decimal(pulled.copied_bytes)} copied" if pulled.copied_bytes else "nothing to copy"
    out.print(f"{pulled.trial}: {what}, in {_short(pulled.target)} ({done})", soft_wrap=True)


def _short(folder: Path) -> str:
    """Below the working directory without it, as people name it."""
    here = Path.cwd()
    return f"{folder.relative_to(here)}/" if folder.is_relative_to(here) and folder != here else str(folder)
