"""`loraq results`: which trial is better, by how much, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import click

from cli import complete
from cli.main import connect
from jobqueue.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from cli.trials import Row
    from jobqueue.ratings import Ratings
    from jobqueue.results import BatchReport
    from jobqueue.service import Client

Format = Literal["table", "json", "csv", "markdown", "plot"]


@click.command()
@click.argument("batches", nargs=-1, required=True, metavar="BATCH...", shell_complete=complete.batches)
@click.option("--json", "json_", is_flag=True, help="Print one JSON document; of several batches, a list.")
@click.option("--csv", is_flag=True, help="Print plain numbers in base units, a line for each trial.")
@click.option("--markdown", is_flag=True, help="Print the table for a README or a pull request.")
@click.option("--plot", is_flag=True, help="Draw loss curves and accuracies in the terminal.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a page of all of it."
)
@click.option("--sort", default="accuracy", show_default=True, metavar="KEY", help="What the first trial is best in.")
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="Only such trials; may be repeated.")
@click.option("--memory", is_flag=True, help="Also show every figure of memory and time.")
def results(
    batches: tuple[str, ...],
    html: Path | None,
    sort: str,
    reverse: bool,
    filters: tuple[str, ...],
    memory: bool,
    **forms: bool,
) -> None:
    """Show which trial is better, by how much, and what it cost.

    The best trial comes first. While a batch is at work, what has ended so far is shown. A BATCH that ends in .json
    is a file that --json wrote: it needs no server.

    KEY is a setting by its dotted key or the last part of it (lora.r, learning_rate), or one of accuracy, likelihood,
    likelihood_normalised, generated, perplexity, bleu, judge, people, vs_base, p, finding, original, kept (points),
    memory (GiB), minutes, tokens, cost, loss, validation_loss, attempts, batch, trial, job, state, reason, gpu, worker.
    Besides = a filter takes != < > <= and >=.

    \b
    loraq results medqa --filter lora.r=8 --sort memory
    loraq results medqa --filter state=failed
    loraq results medqa medqa-2 --filter 'accuracy>50' --html page.html
    """
    from cli.trials import rows_of, selected

    form = _one_of(forms)
    client = connect()
    reports = [report for batch in dict.fromkeys(batches) for report in _reports(client, batch)]
    rows = selected(rows_of(reports), filters, sort, reverse)
    if html:
        from cli.page import page

        try:
            html.write_text(page(reports, rows), encoding="utf-8")
        except OSError as error:
            raise click.FileError(str(html), error.strerror) from error
        click.echo(f"wrote {html}", err=True)
        if form is None:
            return
    print_results(reports, rows, form or "table", memory=memory)


def _one_of(forms: Mapping[str, bool]) -> Format | None:
    """The form that was asked for. Raises UsageError where there are two."""
    asked = [name.rstrip("_") for name, wanted in forms.items() if wanted]
    if len(asked) > 1:
        raise click.UsageError(f"--{asked[0]} and --{asked[1]} are two forms; print one at a time.")
    return cast(Format, asked[0]) if asked else None


def _reports(client: Client, batch: str) -> list[BatchReport]:
    """Of a batch, or those of a file that `--json` wrote. Raises NotFoundError, DataError."""
    from jobqueue.results import BatchReport

    if not batch.endswith(".json"):
        return [client.report(batch)]
    try:
        document = json.loads(Path(batch).read_text(encoding="utf-8"))
        return [BatchReport.from_dict(part) for part in (document if isinstance(document, list) else [document])]
    except OSError as error:
        raise DataError(
            f"cannot read {batch}: {error.strerror}", "Name a batch, or a file that --json wrote."
        ) from error
    except (ValueError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"{batch} holds no results: {why}", "Write such a file with --json.") from error


def print_report(report: BatchReport, form: Format) -> None:
    """One batch's report on stdout, all of it."""
    from cli.trials import rows_of

    print_results([report], rows_of([report]), form)


def print_results(reports: Sequence[BatchReport], rows: Sequence[Row], form: Format, *, memory: bool = False) -> None:
    """The rows, and what is said of their batches, on stdout."""
    from cli import ratings, tables
    from cli.render import console, print_json

    if form == "json":
        wanted = [
            replace(report, trials=tuple(row.trial for row in rows if row.report is report)).to_dict()
            for report in reports
        ]
        print_json(wanted[0] if len(wanted) == 1 else wanted)
    elif form == "csv":
        from cli.table_csv import as_csv

        click.echo(as_csv(rows), nl=False)
    elif form == "markdown":
        parts = [tables.as_markdown(*tables.cells(rows))]
        parts += [tables.as_markdown(*tables.memory_cells(rows))] if memory else []
        for report, found in ratings.ratings_of(reports):
            said = f"{report.batch}: {ratings.title(found)}" if len(reports) > 1 else ratings.title(found)
            parts += [f"{said}:", tables.as_markdown(*ratings.cells(found)), *ratings.notes(found)]
        parts += [*tables.failures(rows), *(problem for report in reports for problem in report.problems)]
        click.echo("\n\n".join([*parts, *tables.exports(rows), *_verdicts(reports), *notes(reports, rows)]))
    elif form == "plot":
        from cli.plot import plot

        plot(console(), rows)
    else:
        _print_table(reports, rows, memory)


def _print_table(reports: Sequence[BatchReport], rows: Sequence[Row], memory: bool) -> None:
    from cli import ratings, tables
    from cli.render import console, table

    out = console()
    for report in reports:
        asked = f", {report.questions:,} questions" if report.questions else ""
        out.print(f"{report.batch}: {report.base_model}{asked}", style="bold", soft_wrap=True)
    out.print()
    if not rows:
        instead = [f"`loraq show {report.batch}` has what {report.batch} did." for report in reports]
        out.print("There is no such trial." if any(report.trials for report in reports) else "\n".join(instead))
    else:
        for columns, cells in [tables.cells(rows), *([tables.memory_cells(rows)] if memory else [])]:
            out.print(table(out, columns, cells))
            out.print()
    for report, found in ratings.ratings_of(reports):
        print_ratings(out, found, f"{report.batch}: " if len(reports) > 1 else "")
        out.print()
    for line in [*tables.failures(rows), *(problem for report in reports for problem in report.problems)]:
        out.print(line, style="red")
    for line in tables.exports(rows):
        out.print(line, soft_wrap=True)
    for verdict in _verdicts(reports):
        out.print(verdict, style="bold")
    for note in notes(reports, rows):
        out.print(note, style="dim")
    for report in reports:
        if not report.complete:
            out.print(f"The batch is still at work: `loraq watch {report.batch}`.", style="dim")


def _verdicts(reports: Sequence[BatchReport]) -> list[str]:
    return [f"{report.batch}: {report.verdict}" if len(reports) > 1 else report.verdict for report in reports]


def print_ratings(out: Console, found: Ratings, batch: str) -> None:
    """Of a judge or of people; `batch` begins the title."""
    from cli import ratings
    from cli.render import table

    out.print(f"{batch}{ratings.title(found)}", style="bold", soft_wrap=True)
    out.print(table(out, *ratings.cells(found)))
    for note in ratings.notes(found):
        out.print(note, style="dim")


def notes(reports: Sequence[BatchReport], rows: Sequence[Row]) -> list[str]:
    """What must be known to read the numbers."""
    said = []
    tested = [sum(t.versus_base is not None and t.versus_base.p_holm is not None for t in r.trials) for r in reports]
    if any(tested):
        together = any(row.trial.versus_single for row in rows)
        family = f"the {max(tested)} trials" if len(reports) == 1 else "the trials of each batch"
        family = "all tests of the batch" if together else family
        many = f", with Holm's correction for {family}" if max(tested) > 1 else ""
        said.append(f"p: exact McNemar test against the base model on the same questions{many}.")
        if together:
            said.append("vs best trial: the same test against the best single trial.")
        said.append("95%: Wilson interval of an accuracy, paired bootstrap interval of a difference.")
    costs = [row.trial.cost for row in rows if row.trial.cost is not None]
    if costs:
        minutes = sum(row.trial.gpu_minutes for row in rows if row.trial.cost is not None)
        said.append(
            f"cost: {sum(costs):,.2f} in all for {minutes / 60:,.2f} GPU hours, "
            "with loading, evaluation and attempts that failed."
        )
    asked = {(r.settings.get("evaluation.source"), r.settings.get("evaluation.split"), r.questions) for r in reports}
    if len(reports) > 1 and len(asked) > 1:
        said.append("The batches were not asked the same questions: do not compare their accuracies.")
    return said
