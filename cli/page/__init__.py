"""`loraq results --html`: one page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cli import ratings, render, tables
from cli.page import charts
from cli.results import notes
from cli.trials import Row, labels, shown
from jobqueue.ratings import Ratings
from jobqueue.results import BatchReport, TrialResult

HERE = Path(__file__).parent
MOST_RANK = 7  # of a column; those of a higher one make the table wider than a window


def page(reports: Sequence[BatchReport], rows: Sequence[Row]) -> str:
    """The HTML of these rows in their order, and of their batches."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns, cells = tables.without(MOST_RANK, *tables.cells(rows))
    memory_columns, memory_cells = tables.memory_cells(rows)
    return environment.get_template("page.html.j2").render(
        title=", ".join(report.batch for report in reports),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        reports=reports,
        several=len(reports) > 1,
        columns=[(" ".join(column.header.split()), column.right) for column in columns],
        rows=[(_swatch(i, rows), row) for i, row in enumerate(cells)],
        memory=([" ".join(column.header.split()) for column in memory_columns], memory_cells),
        failures=[*tables.failures(rows), *(problem for report in reports for problem in report.problems)],
        notes=notes(reports, rows),
        exports=tables.exports(rows),
        batches=[_batch(report, [row for row in rows if row.report is report]) for report in reports],
    )


def _swatch(place: int, rows: Sequence[Row]) -> str:
    """The class of a row's colour in the charts of its batch; the base models below the trials have none."""
    if place >= len(rows):
        return ""
    return charts.colour(sum(row.report is rows[place].report for row in rows[:place]))


def _batch(report: BatchReport, rows: Sequence[Row]) -> Mapping[str, Any]:
    """What the page shows of one batch."""
    trials = [row.trial for row in rows]
    names = labels(rows)
    swept = next((trial.differs for trial in trials if not trial.members), {})
    curves = [
        charts.Curve(name, place, trial.losses)
        for place, (name, trial) in enumerate(zip(names, trials, strict=True))
        if trial.losses
    ]
    return {
        "report": report,
        "losses": charts.line_chart("Training loss by step", "step", curves),
        "legend": [(charts.colour(place), name) for place, name in enumerate(names)],
        "parameters": [chart for key in swept if (chart := _against(report, key, trials, names))],
        "memory": _bars([(n, t.peak_bytes, t.training_bytes, render.memory(t.peak_bytes)) for n, t in _named(rows)]),
        "time": _bars([(n, t.train_minutes, None, render.minutes(t.train_minutes)) for n, t in _named(rows)]),
        "ratings": [_ratings(found) for _, found in ratings.ratings_of([report])],
        "confusions": report.confusions,
        "changed": [
            (title, total, [question for question in report.changed if question.gained is gained])
            for title, total, gained in _turned(report)
        ],
        "settings": [(key, shown(value)) for key, value in report.settings.items() if value is not None],
    }


def _ratings(found: Ratings) -> Mapping[str, Any]:
    columns, rows = ratings.cells(found)
    return {
        "title": ratings.title(found),
        "columns": [(" ".join(column.header.split()), column.right) for column in columns],
        "rows": rows,
        "notes": ratings.notes(found),
    }


def _named(rows: Sequence[Row]) -> list[tuple[str, TrialResult]]:
    return list(zip(labels(rows), (row.trial for row in rows), strict=True))


def _turned(report: BatchReport) -> list[tuple[str, int, bool]]:
    """The two ways in which the best trial can differ from its base model, each with how many questions there are."""
    versus = report.trials[0].versus_base if report.trials else None
    if versus is None or versus.gained is None or versus.lost is None:
        return []
    best = report.trials[0].label or "the trained model"
    return [(f"Right with {best}, wrong before", versus.gained, True), ("Right before, wrong now", versus.lost, False)]


def _against(report: BatchReport, key: str, trials: Sequence[TrialResult], names: Sequence[str]) -> str | None:
    """Accuracy against one swept parameter."""
    metric = report.metric
    if metric is None:
        return None
    points = [
        charts.Point(
            x=trial.differs.get(key),
            text=shown(trial.differs.get(key)),
            y=100 * score.accuracy,
            low=100 * score.interval[0],
            high=100 * score.interval[1],
            place=place,
            title=f"{name}: {render.percent(score.accuracy)} {render.interval(score.interval)}",
        )
        for place, (name, trial) in enumerate(zip(names, trials, strict=True))
        if (score := trial.scores.get(metric)) and key in trial.differs
    ]
    bases = [base.scores[metric].accuracy for base in report.bases if metric in base.scores]
    base = 100 * bases[0] if len(bases) == 1 else None
    return charts.point_chart(f"Accuracy ({metric}) by {key}", key, points, base)


def _bars(values: Sequence[tuple[str, float | None, float | None, str]]) -> list[tuple[str, float, float, str]]:
    """Name, length of the bar and of its dark part in percent of the longest, text; nothing where nothing is known."""
    known = [value for _, value, _, _ in values if value]
    most = max(known, default=0)
    return [
        (name, round(100 * (value or 0) / most, 2), round(100 * (part or 0) / most, 2), text)
        for name, value, part, text in values
        if most
    ]
