"""Trials as a table: of the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from cli import render
from cli.export import compared
from cli.render import NONE, Column
from cli.trials import Row, labels, shown, varied
from jobqueue.comparison import Finding
from jobqueue.job import JobState
from jobqueue.results import MEASURES, METRICS, BaseResult, BatchReport, Measure, OriginalTask, TrialResult

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
        "trial": f"base model ({'4-bit' if base.load_in_4bit else '16-bit'})",
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


# What a line of the CSV has beside the settings that differ, the scores and the comparison with the base model.
_OTHERWISE = (
    "differs",
    "scores",
    "versus_base",
    "versus_single",
    "members",
    "losses",
    "measures",
    "export",
    "original",
)
_PLAIN = [f.name for f in fields(TrialResult) if f.name not in _OTHERWISE]
_ORIGINAL = ("original_before", "original", "original_points", "original_p_holm", "original_finding")
_COMPARED = ("points", "gained", "lost", "p_value", "p_holm", "finding")


def as_csv(rows: Sequence[Row]) -> str:
    """Plain numbers in base units, one line per trial and per base model; the settings that differ in columns."""
    from cli import ratings  # it makes tables too

    settings = varied(rows)
    rated = [("judge", any(row.report.judge for row in rows)), ("people", any(row.report.people for row in rows))]
    scores = [f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high")]
    header = [
        "kind",
        "batch",
        *settings,
        *_PLAIN,
        *scores,
        *MEASURES,
        "questions",
        *_COMPARED,
        "points_low",
        "points_high",
        *_ORIGINAL,
        *(column for by, there in rated for column in ratings.plain_columns(by) if there),
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        have = {key: shown(row.settings.get(key)) for key in settings}
        given = ratings.plain(row.report, row.trial.evaluation)
        writer.writerow({"kind": "trial", "batch": row.report.batch, **have, **_plain(row.trial), **given})
    for batches, base, report in bases_of(rows):
        writer.writerow({"kind": "base", "batch": batches, **_plain(base), **ratings.plain(report, base.job)})
    return file.getvalue()


def _plain(result: TrialResult | BaseResult) -> dict[str, Any]:
    flat: dict[str, Any] = {key: getattr(result, key) for key in _PLAIN if hasattr(result, key)}
    for metric, score in result.scores.items():
        low, high = score.interval
        flat |= {metric: score.accuracy, f"{metric}_low": low, f"{metric}_high": high, "questions": score.questions}
    flat |= {str(measure): value for measure, value in result.measures.items()}
    versus = result.versus_base if isinstance(result, TrialResult) else None
    if versus:
        flat |= {key: getattr(versus, key) for key in _COMPARED}
        flat |= dict(zip(("points_low", "points_high"), versus.interval or (), strict=False))
    original = result.original if isinstance(result, TrialResult) else None
    if original and original.metric:
        before, now = original.scores_before.get(original.metric), original.scores[original.metric]
        kept = original.versus_before
        values = (kept.points, kept.p_holm, kept.finding) if kept else (None, None, None)
        flat |= dict(zip(_ORIGINAL, (before and before.accuracy, now.accuracy, *values), strict=True))
    return {key: "" if value is None else value for key, value in flat.items()}
