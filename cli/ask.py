"""`loraq ask`: what a base model and a trial's adapter answer, side by side, as it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from cli import complete
from cli.main import connect
from jobqueue.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live
    from rich.text import Text

    from jobqueue.events import Event
    from jobqueue.job import Job
    from jobqueue.service import Client

SIDE_BY_SIDE = 100  # columns of a terminal from which on answers stand beside each other


@click.command()
@click.argument("trial", metavar="BATCH/TRIAL", shell_complete=complete.trials)
@click.argument("prompt", required=False)
@click.option(
    "--file",
    type=click.File(encoding="utf-8"),
    help="Prompts: one per line, or of a .jsonl file texts or objects with `prompt`; - reads lines from stdin.",
)
@click.option("--system", metavar="TEXT", help="A system prompt; else that of the trial's data. Empty: none.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: the likeliest token each time; above: drawn.",
)
@click.option("--seed", type=click.IntRange(min=0), default=3407, show_default=True, help="Of what is drawn.")
@click.option("--base-only", is_flag=True, help="Ask the base model alone.")
@click.option("--adapter-only", is_flag=True, help="Ask the adapter alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, at the end.")
def ask(
    trial: str, prompt: str | None, file: IO[str] | None, system: str | None, base_only: bool, adapter_only: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Ask a trial's base model and its adapter the same, and show both answers.

    A worker answers, ahead of jobs that wait: with the chat template, the system prompt and the bits that the trial was
    trained with. Nothing of it is kept but the answers, for a day. Ctrl-C stops it.

    \b
    loraq ask medqa-rank/2 "Which drug for a urinary tract infection?"
    loraq ask medqa-rank/2 --file prompts.txt > answers.txt
    """
    from cli.render import console
    from jobqueue.retry import check_succeeded

    if (prompt is None) == (file is None):
        raise click.UsageError("Give a prompt, or a --file of them.")
    if base_only and adapter_only:
        raise click.UsageError("--base-only and --adapter-only leave nobody to ask.")
    prompts = [prompt] if prompt is not None else _prompts(file) if file else []
    if system is not None:
        options["system_prompt"] = system or None
    if base_only or adapter_only:
        options["asked"] = ("base" if base_only else "adapter",)
    client = connect()
    job = client.ask(trial, prompts, **options)
    try:
        job = _json(client, job) if as_json else _show(client, job, console())
    except KeyboardInterrupt:
        client.cancel(job.id)
        click.echo(f"{job.id} is cancelled.", err=True)
        raise
    check_succeeded(job, f"{trial} has not answered")


def _prompts(file: IO[str]) -> list[str]:
    """Raises DataError where a line of a .jsonl file is no prompt."""
    numbered = [(number, line.strip()) for number, line in enumerate(file, start=1) if line.strip()]
    if Path(file.name).suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(prompt, str):
            do = 'Write a text, or an object such as {"prompt": "..."}, on each line.'
            raise DataError(f"{file.name}:{number}: there is no prompt", do)
        prompts.append(prompt)
    return prompts


def _json(client: Client, job: Job) -> Job:
    from cli.render import console, print_json

    for _ in _events(client, job, console(stderr=True)):
        pass
    job = client.job(job.id)
    if answers := job.outcome.get("answers"):
        asked = {key: job.spec[key] for key in ("base_model", "system_prompt", "max_new_tokens", "temperature", "seed")}
        print_json({"job": job.id, "trial": job.spec["adapter_job"], **asked, "answers": answers})
    return job


def _events(client: Client, job: Job, notes: Console) -> Iterator[Event]:
    from cli.logs import coming
    from cli.watch import Patience

    return coming(client, job.id, "0", Patience(notes))


@dataclass
class Said:
    """One answer as far as it is known."""

    text: str = ""
    done: bool = False
    cut: bool = False


@dataclass
class Answers:
    """What has been said so far, kept up to date by the events of the job."""

    prompts: Sequence[str]
    asked: Sequence[str]
    status: str = "waiting for a worker"
    said: dict[tuple[int, str], Said] = field(default_factory=dict)
    _attempt: int = 0

    def take(self, event: Event) -> None:
        if event.attempt != self._attempt:  # it begins anew
            self._attempt, self.said = event.attempt, {}
        if event.kind == "state":
            self.status = event.text
        elif event.data.get("phase") == "load":
            self.status = "loading the model"
        elif event.kind == "answer":
            said = self.said.setdefault((event.data["prompt"], event.data["by"]), Said())
            said.done, said.cut = event.data["done"], event.data.get("cut", False)
            said.text = event.data["text"] if said.done else said.text + event.data["text"]

    def of(self, prompt: int) -> list[Said]:
        return [self.said.get((prompt, by), Said()) for by in self.asked]

    def complete(self, prompt: int) -> bool:
        return all(said.done for said in self.of(prompt))


def _show(client: Client, job: Job, out: Console) -> Job:
    """Each prompt with its answers, as they come on a terminal, else as soon as they are whole."""
    from cli.render import console

    answers = Answers(job.spec["prompts"], job.spec["asked"])
    page = Page(job, answers, out)
    shown = 0
    with page.live() as live:
        for event in _events(client, job, out if live else console(stderr=True)):
            answers.take(event)
            while shown < len(answers.prompts) and answers.complete(shown):
                out.print(page.whole(shown), soft_wrap=live is None)
                shown += 1
                page.at = shown
            if live is not None:
                live.refresh()
    return client.job(job.id)


class Page:
    """How prompts and answers look."""

    def __init__(self, job: Job, answers: Answers, out: Console) -> None:
        self._answers, self._out = answers, out
        trial = "/".join(job.spec["adapter_job"].rsplit(".", 1))
        label = f"{trial}: {job.trial}" if job.trial else trial
        self._titles = {"base": f"base model {job.spec['base_model'].rpartition('/')[2]}", "adapter": label}
        self.at = 0  # the prompt that is being answered

    @contextmanager
    def live(self) -> Iterator[Live | None]:
        """The part that is being written, where it can be written over; None elsewhere."""
        from rich.live import Live

        if not self._out.is_terminal:
            yield None
            return
        with Live(self, console=self._out, auto_refresh=False, transient=True) as live:
            yield live

    def __rich_console__(self, out: Console, options: ConsoleOptions) -> RenderResult:
        """The end of what is being written, as much as there is room for."""
        from rich.segment import Segment
        from rich.text import Text

        if self.at >= len(self._answers.prompts):
            return
        started = any(said.text for said in self._answers.of(self.at))
        parts = [self.whole(self.at)] if started else [self._prompt(self.at), Text(self._answers.status, "dim")]
        lines = [line for part in parts for line in out.render_lines(part, options, pad=False)]
        for line in lines[-max(1, out.height - 1) :]:
            yield from line
            yield Segment.line()

    def whole(self, prompt: int) -> RenderableType:
        """A prompt and what has been answered: side by side where there is room, else one under the other."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        titles = [Text(self._titles[by], "bold") for by in self._answers.asked]
        answers = [self._answer(said) for said in self._answers.of(prompt)]
        if len(titles) == 1 or not self._out.is_terminal or self._out.width < SIDE_BY_SIDE:
            parts = [part for pair in zip(titles, answers, strict=True) for part in (*pair, Text())]
            return Group(self._prompt(prompt), *parts)
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        for title in titles:
            table.add_column(title, ratio=1, overflow="fold")
        table.add_row(*answers)
        return Group(self._prompt(prompt), table, Text())

    def _prompt(self, number: int) -> Text:
        from rich.text import Text

        count = len(self._answers.prompts)
        which = f"{number + 1}/{count} " if count > 1 else ""
        return Text.assemble((f"{which}> ", "dim"), (_printable(self._answers.prompts[number]), "cyan"))

    def _answer(self, said: Said) -> Text:
        from rich.text import Text

        text = Text(_printable(said.text) or ("(nothing)" if said.done else ""), "" if said.text else "dim")
        return text.append(" ... (cut: --max-new-tokens)", "dim") if said.cut else text


def _printable(text: str) -> str:
    """Without codes that a terminal would obey: a model may write any."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t").strip("\n")
