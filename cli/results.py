"""`loraq results`: which trial is better, by how much, and what it cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.main import connect

if TYPE_CHECKING:
    from rich.console import Console

    from cli.render import Column
    from jobqueue.results import BaseResult, BatchReport, TrialResult

Format = Literal["table", "json", "csv", "markdown"]


@click.command()
@click.argument("batch")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "markdown"]),
    default="table",
    show_default=True,
    help="How to print them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; short for --format json.")
def results(batch: str, form: Format, as_json: bool) -> None:
    """Show which trial is better, by how much, and what it cost.

    The best trial comes first. While the batch is at work, what has ended so far is shown.
    """
    print_report(connect().report(batch), "json" if as_json else form)


def print_report(report: BatchReport, form: Format) -> None:
    """The report on stdout."""
    from cli.render import console, print_json

    if form == "json":
        print_json(report.to_dict())
    elif form == "csv":
        click.echo(as_csv(report), nl=False)
    elif form == "markdown":
        click.echo(as_markdown(report))
    else:
        _print_table(console(), report)


def _print_table(out: Console, report: BatchReport) -> None:
    from cli.render import table
    from jobqueue.job import JobState

    columns, rows = cells(report)
    title = f"{report.batch}: {report.base_model}"
    if report.questions:
        title += f", {report.questions:,} questions"
    out.print(title, style="bold", soft_wrap=True)
    out.print()
    out.print(table(out, columns, rows))
    out.print()
    for trial in report.trials:
        if trial.state is JobState.FAILED:
            out.print(f"{trial.label or trial.job} failed ({trial.reason}): {trial.message}", style="red")
    out.print(report.verdict, style="bold")
    if any(trial.versus_base and trial.versus_base.p_value is not None for trial in report.trials):
        out.print("p: exact McNemar test on the same questions, for each trial by itself.", style="dim")
    if not report.complete:
        out.print(f"The batch is still at work: `loraq watch {report.batch}`.", style="dim")


def cells(report: BatchReport) -> tuple[list[Column], list[list[str]]]:
    """Columns and rows of the table; columns that would be empty are left out."""
    from cli.render import NONE, Column

    named = {
        "trial": Column("trial", wrap=True),
        "job": Column("job", rank=6),
        "state": Column("state", rank=5),
        "likelihood": Column("likelihood", right=True, rank=1 if report.metric == "generated" else 0),
        "generated": Column("generated", right=True, rank=7 if report.metric == "likelihood" else 0),
        "interval": Column("95%", rank=3),
        "points": Column("vs base", right=True, rank=1),
        "p": Column("p", right=True, rank=4),
        "peak": Column("memory", right=True, rank=2),
        "training": Column("for training", right=True, rank=10),
        "minutes": Column("time", right=True, rank=2),
        "tokens": Column("tokens/s", right=True, rank=8),
        "loss": Column("loss", right=True, rank=9),
        "attempts": Column("attempts", right=True, rank=11),
        "gpu": Column("GPU", rank=12),
    }
    rows = [_trial_cells(report, trial) for trial in report.trials]
    if all(row["state"] == "succeeded" for row in rows):
        del named["state"]
    if all(row["attempts"] in ("0", "1") for row in rows):
        del named["attempts"]
    rows += [_base_cells(report, base) for base in report.bases]
    shown = [key for key in named if key == "trial" or any(row.get(key, NONE) not in ("", NONE) for row in rows)]
    return [named[key] for key in shown], [[row.get(key) or NONE for key in shown] for row in rows]


def _trial_cells(report: BatchReport, trial: TrialResult) -> dict[str, str]:
    from cli import render

    versus, primary = trial.versus_base, trial.scores.get(report.metric) if report.metric else None
    return {
        "trial": trial.label or "the only trial",
        "job": trial.job,
        "state": f"{trial.state} ({trial.reason})" if trial.reason and trial.state == "failed" else trial.state.value,
        **{metric: render.percent(score.accuracy) for metric, score in trial.scores.items()},
        "interval": render.interval(primary.interval if primary else None),
        "points": render.points(versus.points if versus else None),
        "p": render.p_value(versus.p_value if versus else None),
        "peak": render.memory(trial.peak_bytes),
        "training": render.memory(trial.training_bytes),
        "minutes": render.minutes(trial.train_minutes),
        "tokens": render.number(trial.tokens_per_s),
        "loss": render.number(trial.final_loss, 3),
        "attempts": str(trial.attempts),
        "gpu": trial.gpu,
    }


def _base_cells(report: BatchReport, base: BaseResult) -> dict[str, str]:
    from cli import render

    primary = base.scores.get(report.metric) if report.metric else None
    return {
        "trial": f"base model ({'4-bit' if base.load_in_4bit else '16-bit'})",
        "job": base.job,
        "state": base.state.value,
        **{metric: render.percent(score.accuracy) for metric, score in base.scores.items()},
        "interval": render.interval(primary.interval if primary else None),
    }


def as_markdown(report: BatchReport) -> str:
    """The table for a README or a pull request."""
    columns, rows = cells(report)

    def line(parts: Sequence[str]) -> str:
        return f"| {' | '.join(part.replace('|', chr(92) + '|') for part in parts)} |"

    rule = line(["--:" if column.right else ":--" for column in columns])
    return "\n".join([line([column.header for column in columns]), rule, *map(line, rows), "", report.verdict])


def as_csv(report: BatchReport) -> str:
    """Plain numbers in base units, one line per trial and per base model."""
    lines = [_flat(trial) for trial in report.trials] + [_flat(base) for base in report.bases]
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


_METRICS = ("likelihood", "likelihood_normalised", "generated")
_TRIAL_FIELDS = (
    "label", "job", "evaluation", "state", "reason", "message", "attempts", "worker", "gpu", "base",
    "peak_bytes", "training_bytes", "train_minutes", "tokens_per_s", "final_loss",
)  # fmt: skip
CSV_FIELDS = (
    "kind",
    *_TRIAL_FIELDS,
    *(f"{metric}{part}" for metric in _METRICS for part in ("", "_low", "_high")),
    "questions",
    *("points", "gained", "lost", "p_value"),
)


def _flat(row: TrialResult | BaseResult) -> dict[str, Any]:
    fields = {key: getattr(row, key, None) for key in _TRIAL_FIELDS}
    is_base = not hasattr(row, "label")
    flat = {"kind": "base" if is_base else "trial", **fields}
    for metric, score in row.scores.items():
        low, high = score.interval
        flat |= {
            metric: score.accuracy,
            f"{metric}_low": low,
            f"{metric}_high": high,
            "questions": score.questions,
        }
    versus = getattr(row, "versus_base", None)
    if versus:
        flat |= {key: getattr(versus, key) for key in ("points", "gained", "lost", "p_value")}
    return {key: "" if value is None else value for key, value in flat.items()}
