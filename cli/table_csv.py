"""Trials as CSV: plain numbers for a spreadsheet or pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from cli import ratings
from cli.tables import bases_of
from cli.trials import Row, shown, varied
from jobqueue.comparison import Comparison
from jobqueue.results import MEASURES, METRICS, BaseResult, TrialResult

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
_COMPARED = ("points", "gained", "lost", "p_value", "p_holm", "finding", "points_low", "points_high")
_SINGLE = "versus_single_"  # begins what an ensemble's comparison with the best trial is called


def as_csv(rows: Sequence[Row]) -> str:
    """Plain numbers in base units, one line per trial and per base model; the settings that differ in columns."""
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
        *(_SINGLE + part for part in _COMPARED if any(row.trial.versus_single for row in rows)),
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
    if isinstance(result, TrialResult):
        flat |= _compared(result.versus_base) | {
            _SINGLE + key: value for key, value in _compared(result.versus_single).items()
        }
    original = result.original if isinstance(result, TrialResult) else None
    if original and original.metric:
        before, now = original.scores_before.get(original.metric), original.scores[original.metric]
        kept = original.versus_before
        values = (kept.points, kept.p_holm, kept.finding) if kept else (None, None, None)
        flat |= dict(zip(_ORIGINAL, (before and before.accuracy, now.accuracy, *values), strict=True))
    return {key: "" if value is None else value for key, value in flat.items()}


def _compared(versus: Comparison | None) -> dict[str, Any]:
    if versus is None:
        return {}
    low, high = versus.interval or (None, None)
    have = asdict(versus) | {"finding": versus.finding, "points_low": low, "points_high": high}
    return {key: have[key] for key in _COMPARED}
