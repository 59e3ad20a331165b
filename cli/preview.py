"""`loraq preview`: what a training would read, and what of it is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.main import connect

if TYPE_CHECKING:
    from rich.console import Console

    from jobqueue.chat import Chat
    from jobqueue.preview import Part, Preview, RowPreview
    from jobqueue.sweep import Sweep
    from jobqueue.tokens import DataReport

STYLES: dict[Part, str] = {"read": "", "trained": "bold green", "cut": "strike dim"}
# For output without colours.
MARKS: dict[Part, tuple[str, str]] = {"read": ("", ""), "trained": ("<<", ">>"), "cut": ("[cut: ", "]")}
BAR = 40  # characters of the longest bar


@click.command()
@click.argument("file")
@click.option("--row", type=click.IntRange(min=1), metavar="N", help="Show row N of the data; without it, the first.")
@click.option("--base-model", metavar="MODEL", help="Whose tokenizer to take: a hub id or a folder.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the sweep file, e.g. training.max_seq_length=512. May be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def preview(file: str, row: int | None, base_model: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Show what a training would read, and what of it is trained on.

    FILE is a sweep file, of which the first configuration is shown, or data: a file, a URL or a hub id. No batch is
    submitted. Tokens need `pip install 'loraq[data]'` and the base model's tokenizer, which is fetched from the hub
    where the model is no folder of this machine; of data alone, give --base-model. Where this machine lacks what it
    takes, a control worker is asked, to which local data travels.
    """
    from cli.render import console, print_json
    from jobqueue.sweep import read_sweep, sweep_of_data

    if file.endswith((".yaml", ".yml")):
        sweep = read_sweep(Path(file), (*sets, f"base_model={base_model}") if base_model else sets)
        shown = _made(sweep, row, data_alone=False, tokens=True)
    else:
        sweep = sweep_of_data(file, base_model or "none", sets)
        shown = _made(sweep, row, data_alone=True, tokens=base_model is not None)
    if as_json:
        print_json(shown)
    else:
        _print(console(), shown, len(sweep.trials))


def _made(sweep: Sweep, row: int | None, *, data_alone: bool, tokens: bool) -> Preview:
    """Here where that can be, else by a worker, else what is to be had here. Raises LoraqError where nothing is."""
    from cli.render import console
    from jobqueue.errors import LoraqError, MachineError, StorageError
    from jobqueue.preview import preview as make

    here: Preview | LoraqError
    try:
        here = make(sweep, _chat(sweep) if tokens else "no base model; give one with --base-model", row, data_alone)
    except (MachineError, StorageError) as error:
        here = error
    lacking = here.what if isinstance(here, LoraqError) else here.no_tokens if tokens else None
    if not lacking:
        assert not isinstance(here, LoraqError)
        return here
    try:
        with console(stderr=True).status("asking a worker"):
            return connect().preview(sweep, row, data_alone=data_alone, tokens=tokens)
    except LoraqError as error:
        if isinstance(here, LoraqError):
            raise type(here)(f"{here.what}; and {error.what}", here.do) from error
        return replace(here, no_tokens=f"{lacking} And no worker has read them: {error.what}.")


def _chat(sweep: Sweep) -> Chat | str:
    """The tokenizer of the first configuration, or why there is none."""
    from jobqueue import base_model, sources, tokenizer_files
    from jobqueue.errors import ChatTemplateError, LoraqError, Problem, SpecError

    run = sweep.trials[0].run
    template = sources.chat_template(run.chat_template, sweep.file)
    try:
        located = base_model.locate(run.base_model, sweep.file.parent)
    except ValueError as error:
        raise SpecError([Problem(str(error), str(sweep.file), path="base_model")]) from None
    try:
        return tokenizer_files.chat_of(located, template)
    except ChatTemplateError:
        raise
    except LoraqError as error:
        return f"{error.what}. {error.do}"


def _print(out: Console, shown: Preview, trials: int) -> None:
    from rich.text import Text

    from cli.render import counted

    summary = shown.rows
    lines = [
        ("data", f"{shown.source}: {counted(summary.rows, 'row')}, {summary.usable:,} usable"),
        ("layout", summary.reason),
        *(
            ("left out", f"{s.count:,}: {reason} (line {', '.join(map(str, s.lines))})")
            for reason, s in summary.skipped.items()
        ),
    ]
    if shown.kept_back:
        lines.append(("validation", f"{counted(shown.kept_back, 'row')} kept back"))
    if shown.replayed:
        lines.append(("replay", f"{counted(shown.replayed, 'row')} of other data mixed in"))
    if trials > 1:
        lines.append(("sweep", f"the first of {trials} configurations"))
    if shown.tokens:
        lines += _tokens(shown, shown.tokens)
    else:
        lines.append(("tokens", f"none: {shown.no_tokens}"))
    for name, text in lines:
        out.print(Text(f"{name:<11}", style="dim") + Text(text), soft_wrap=True)
    if shown.tokens and shown.tokens.histogram:
        _print_histogram(out, shown.tokens, shown.max_seq_length)
    for warning in shown.warnings:
        out.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    _print_row(out, shown.row, shown.max_seq_length)


def _tokens(shown: Preview, report: DataReport) -> list[tuple[str, str]]:
    from cli.render import counted

    share = f" ({report.trained_tokens / report.tokens:.1%})" if report.tokens else ""
    rows_cut, doubled = counted(report.truncated, "row"), counted(report.duplicates, "row")
    lines = [
        ("tokens", f"{report.tokens:,} by the tokenizer of {shown.base_model}"),
        ("trained on", f"{report.trained_tokens:,} of them{share}, in {counted(report.used, 'row')}"),
        ("cut", f"{rows_cut} at max_seq_length {shown.max_seq_length:,}; the longest has {report.longest:,} tokens"),
        ("doubled", f"{doubled} that {'reads' if report.duplicates == 1 else 'read'} the same as an earlier one"),
    ]
    return [*lines, *(("dropped", f"{counted(count, 'row')}: {reason}") for reason, count in report.dropped.items())]


def _print_histogram(out: Console, report: DataReport, limit: int) -> None:
    from rich.text import Text

    out.print("\nTokens per row")
    most = max(count for _, _, count in report.histogram)
    width = len(f"{report.longest:,}")
    for low, high, count in report.histogram:
        bar = "█" * -(-count * BAR // most)
        style = "yellow" if high > limit else "green"
        line = (
            Text(f"  {low:>{width},} to {high:>{width},}  ") + Text(f"{bar:<{BAR}}", style=style) + Text(f" {count:,}")
        )
        out.print(line + Text("  cut" if low > limit else "  some cut" if high > limit else "", style=style))


def _print_row(out: Console, row: RowPreview, limit: int) -> None:
    from rich.text import Text

    what = f", {row.tokens:,} tokens, {row.trained_tokens:,} trained on" if row.tokens else ""
    out.print(f"\nRow {row.number}{what}", style="bold")
    if row.skipped:
        out.print(f"It is left out: {row.skipped}", style="yellow", soft_wrap=True)
    if row.segments:
        text, coloured = Text(), out.color_system and not out.no_color
        for part, kind in row.segments:
            before, after = ("", "") if coloured else MARKS[kind]
            text.append(f"{before}{part}{after}", style=STYLES[kind])
        out.print(text, soft_wrap=True)
    else:
        for turn in row.conversation:
            calls = f" {json.dumps(turn['tool_calls'], ensure_ascii=False)}" if turn.get("tool_calls") else ""
            out.print(Text(f"{turn['role']}: ", style="dim") + Text(f"{turn['content']}{calls}"), soft_wrap=True)
