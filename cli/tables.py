"""Trials as a table: of the terminal, as Markdown, as CSV."""

from __future__ import annotations

from collections.abc import Sequence

from cli import render
from cli.export import compared
from cli.render import NONE, Column
from cli.trials import Row, labels
from jobqueue.comparison import Finding
from jobqueue.job import JobState
from jobqueue.results import METRICS, BaseResult, BatchReport, Measure, OriginalTask, TrialResult

SHORT: dict[Finding, str] = {"no difference shown": "not shown"}  # beside a difference
Cells = tuple[list[Column], list[list[str]]]


def cells(rows: Sequence[Row]) -> Cells:
    """Columns and rows of the table, the base models last; columns that would be empty are left out."""
    metrics = {row.report.metric for row in rows}
    metric = metrics.pop() if len(metrics) == 1 else None
    based = any(row.trial.versus_base for row in rows)
    scored = f"{metric or 'accuracy'}\nbase → tuned" if based else metric or "accuracy"
    named: dict[str, Column] = {
        "batch": Column("batch"),
        "trial": Column("trial", wrap=True),
        "job": Column("job", rank=8),
        "state": Column("state", rank=5, below="trial"),
        "scored": Column(scored, right=True),
        "interval": Column("95%", right=True, rank=3, below=scored),
        **{str(m): Column(m.replace("_", "\n"), right=True, rank=9 if "_" in m else 7) for m in METRICS if m != metric},
        "perplexity": Column("perplexity", right=True, rank=3),
        "bleu": Column("BLEU", right=True, rank=3),
        "points": Column("vs base", right=True, rank=1),
        "difference": Column("vs base\n95%", right=True, rank=6),
        "finding": Column("finding", right=True, wrap=True, rank=1, below="vs base"),
        "p": Column("p", right=True, rank=4),
        "single": Column("vs best\ntrial", right=True, wrap=True, rank=4),
        "original": Column("original task\nbefore → after", right=True, rank=1),
        "kept": Column("kept", right=True, wrap=True, rank=1, below="original task\nbefore → after"),
        "peak": Column("memory", right=True, rank=2),
        "minutes": Column("time", right=True, rank=2, below="memory"),
        "training": Column("for training", right=True, rank=11),
        "tokens": Column("tokens/s", right=True, rank=7),
        "cost": Column("cost", right=True, rank=3),
        "loss": Column("loss", right=True, rank=9),
        "validation": Column("validation loss", right=True, rank=8),
        "attempts": Column("attempts", right=True, rank=12),
        "gpu": Column("GPU", rank=13),
    }
    made = [_trial_cells(row, label) for row, label in zip(rows, labels(rows), strict=True)]
    if len({row.report.batch for row in rows}) == 1:
        del named["batch"]
    made += [_base_cells(*found) for found in bases_of(rows)]
    if all(row["state"] == "succeeded" for row in made):
        del named["state"]
    if all(row.get("attempts", "0") in ("0", "1") for row in made):
        del named["attempts"]
    kept = [key for key in named if key == "trial" or any(row.get(key, NONE) not in ("", NONE) for row in made)]
    return [named[key] for key in kept], [[row.get(key) or NONE for key in kept] for row in made]


def without(rank: int, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Cells:
    """The table without its columns of a higher rank."""
    kept = [i for i, column in enumerate(columns) if column.rank <= rank]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def bases_of(rows: Sequence[Row]) -> list[tuple[str, BaseResult, BatchReport]]:
    """The base models of the rows' batches, each once, with the names of the batches that are compared with it."""
    reports = {row.report.batch: row.report for row in rows}.values()
    found = {base.job: (base, report) for report in reports for base in report.bases}
    users = {job: [r.batch for r in reports if any(base.job == job for base in r.bases)] for job in found}
    return [(", ".join(users[job]), base, report) for job, (base, report) in found.items()]


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each trial and base model that did not succeed, with the reason."""
    ended: list[tuple[str, TrialResult | OriginalTask | BaseResult]] = []
    for row in rows:
        name = row.trial.label or row.trial.job
        ended.append((name, row.trial))
        if row.trial.original and row.trial.state is JobState.SUCCEEDED:
            ended.append((f"{name} on the original task", row.trial.original))
    ended += [(f"base model {base.base_model}", base) for _, base, _ in bases_of(rows)]
    return [
        f"{name} {f'failed ({result.reason})' if result.state is JobState.FAILED else 'was cancelled'}"
        f": {result.message or 'no reason given'}"
        for name, result in ended
        if result.state in (JobState.FAILED, JobState.CANCELLED)
    ]


def exports(rows: Sequence[Row]) -> list[str]:
    """A line for each form in which a trial was written, or why it was not."""
    said = []
    for row, label in zip(rows, labels(rows), strict=True):
        export = row.trial.export
        if export and export.state in (JobState.FAILED, JobState.CANCELLED):
            ended = f"failed ({export.reason})" if export.state is JobState.FAILED else "was cancelled"
            said.append(f"{label}: its export {ended}: {export.message or 'no reason given'}")
        if export:
            said += [
                f"{label}: {made['format']} {compared(made)}: {export.folder}/{made['path']}" for made in export.exports
            ]
    return said


def _trial_cells(row: Row, label: str) -> dict[str, str]:
    report, trial, versus, single = row.report, row.trial, row.trial.versus_base, row.trial.versus_single
    primary = trial.scores.get(report.metric) if report.metric else None
    base = next((base for base in report.bases if base.job == trial.base), None)
    before = base.scores.get(report.metric) if base and report.metric else None
    tuned = render.percent(row.accuracy)
    return {
        "batch": report.batch,
        "trial": label,
        "job": trial.job,
        "state": f"{trial.state} ({trial.reason})" if trial.reason and trial.state == "failed" else trial.state.value,
        "scored": f"{render.percent(before.accuracy)} → {tuned}" if before and primary else tuned,
        "interval": render.interval(primary.interval if primary else None),
        **{metric: render.percent(score.accuracy) for metric, score in trial.scores.items()},
        **_measure_cells(trial),
        "points": render.points(versus.points if versus else None),
        "difference": render.points_interval(versus.interval if versus else None),
        "finding": versus.finding if versus else NONE,
        "p": render.p_value(row.p_value),
        "single": f"{render.points(single.points)} {single.finding}" if single else NONE,
        **_original_cells(trial.original),
        "peak": render.memory(trial.peak_bytes),
        "minutes": render.minutes(trial.train_minutes),
        "training": render.memory(trial.training_bytes),
        "tokens": render.number(trial.tokens_per_s),
        "cost": render.number(trial.cost, 2),
        "loss": render.number(trial.final_loss, 3),
        "validation": render.number(trial.validation_loss, 3),
        "attempts": str(trial.attempts),
        "gpu": trial.gpu,
    }


def _original_cells(original: OriginalTask | None) -> dict[str, str]:
    """By the first metric or measure that there is."""
    if original is None:
        return {}
    versus, metric = original.versus_before, original.metric
    if metric:
        before = original.scores_before.get(metric)
        shown = [render.percent(score.accuracy) for score in (before, original.scores[metric]) if score]
    else:
        measures = next(iter(original.measures), None)
        values = [found.get(measures) for found in (original.measures_before, original.measures)] if measures else []
        shown = [render.number(value, 3) for value in values if value is not None]
    kept = f"{render.points(versus.points)} {SHORT.get(versus.finding, versus.finding)}" if versus else NONE
    return {"original": " → ".join(shown) or NONE, "kept": kept}


def _base_cells(batches: str, base: BaseResult, report: BatchReport) -> dict[str, str]:
    primary = base.scores.get(report.metric) if report.metric else None
    return {
        "batch": batches,
        "trial": base.shown_as,
        "job": base.job,
        "state": base.state.value,
        "scored": render.percent(primary.accuracy if primary else None),
        "interval": render.interval(primary.interval if primary else None),
        **{metric: render.percent(score.accuracy) for metric, score in base.scores.items()},
        **_measure_cells(base),
    }


def _measure_cells(result: TrialResult | BaseResult) -> dict[str, str]:
    digits: dict[Measure, int] = {"perplexity": 3, "bleu": 1}
    return {measure: render.number(value, digits[measure]) for measure, value in result.measures.items()}


def memory_cells(rows: Sequence[Row]) -> Cells:
    """Every figure of memory and time of training, in the words of Unsloth's notebooks."""
    columns = [
        Column("trial", wrap=True),
        Column("GPU", wrap=True),
        Column("max memory", right=True),
        Column("at start", right=True, below="max memory"),
        Column("peak", right=True),
        Column("of max", right=True, below="peak"),
        Column("for training", right=True),
        Column("of max", right=True, below="for training"),
        Column("training", right=True),
        Column("minutes", right=True, below="training"),
    ]
    made = []
    for row, label in zip(rows, labels(rows), strict=True):
        trial = row.trial
        made.append(
            [
                label,
                trial.gpu or NONE,
                *map(render.memory, (trial.total_bytes, trial.start_bytes, trial.peak_bytes)),
                render.percent(_share(trial.peak_percent), 2),
                render.memory(trial.training_bytes),
                render.percent(_share(trial.training_percent), 2),
                f"{trial.train_seconds:,.1f} s" if trial.train_seconds is not None else NONE,
                f"{trial.train_minutes:,.2f} min" if trial.train_minutes is not None else NONE,
            ]
        )
    return columns, made


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def as_markdown(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """The table for a README or a pull request."""

    def line(parts: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(part.split()).replace('|', chr(92) + '|') for part in parts)} |"

    rule = line(["--:" if column.right else ":--" for column in columns])
    return "\n".join([line([column.header for column in columns]), rule, *map(line, rows)])
