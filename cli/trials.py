"""The trials of one or several batches as rows: what differs between them, which are wanted, and in which order."""

from __future__ import annotations

import difflib
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from jobqueue.ratings import OVERALL, Ratings
from jobqueue.results import METRICS, BatchReport, Metric, OriginalTask, TrialResult

MOST_LABEL = 60  # characters of a value in a label


@dataclass(frozen=True)
class Row:
    """One trial and the batch that it is of."""

    report: BatchReport
    trial: TrialResult

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every dotted key of its specs."""
        return {**self.report.settings, **self.trial.differs}

    @property
    def accuracy(self) -> float | None:
        """By the batch's primary metric, 0 to 1."""
        score = self.trial.scores.get(self.report.metric) if self.report.metric else None
        return score.accuracy if score else None

    @property
    def p_value(self) -> float | None:
        """Against the base model; corrected where it was."""
        versus = self.trial.versus_base
        return None if versus is None else versus.p_value if versus.p_holm is None else versus.p_holm


@dataclass(frozen=True)
class _Field:
    """What trials can be sorted and filtered by, beside their settings; numbers in the units of the table."""

    value: Callable[[Row], Any]
    high_first: bool = False


def _percent(metric: Metric) -> _Field:
    def accuracy(row: Row) -> float | None:
        score = row.trial.scores.get(metric)
        return 100 * score.accuracy if score else None

    return _Field(accuracy, high_first=True)


def _rated(ratings: Ratings | None, row: Row) -> float | None:
    """The overall score of what it wrote, 1 to 5."""
    model = ratings.of(row.trial.evaluation) if ratings else None
    return model.means[OVERALL].value if model else None


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _on_original_task(row: Row) -> float | None:
    original = row.trial.original
    return original.scores[original.metric].accuracy if original and original.metric else None


def _kept(original: OriginalTask | None) -> float | None:
    """Points against what the training began with."""
    return original.versus_before.points if original and original.versus_before else None


FIELDS: Mapping[str, _Field] = {
    "accuracy": _Field(lambda row: _times(100, row.accuracy), True),
    **{str(metric): _percent(metric) for metric in METRICS},
    "perplexity": _Field(lambda row: row.trial.measures.get("perplexity")),
    "bleu": _Field(lambda row: row.trial.measures.get("bleu"), True),
    "judge": _Field(lambda row: _rated(row.report.judge, row), True),
    "people": _Field(lambda row: _rated(row.report.people, row), True),
    "vs_base": _Field(lambda row: row.trial.versus_base and row.trial.versus_base.points, True),
    "p": _Field(lambda row: row.p_value),
    "finding": _Field(lambda row: row.trial.versus_base and row.trial.versus_base.finding),
    "original": _Field(lambda row: _times(100, _on_original_task(row)), True),
    "kept": _Field(lambda row: _kept(row.trial.original), True),
    "memory": _Field(lambda row: _times(1 / 2**30, row.trial.peak_bytes)),
    "minutes": _Field(lambda row: row.trial.train_minutes),
    "tokens": _Field(lambda row: row.trial.tokens_per_s, True),
    "cost": _Field(lambda row: row.trial.cost),
    "loss": _Field(lambda row: row.trial.final_loss),
    "validation_loss": _Field(lambda row: row.trial.validation_loss),
    "attempts": _Field(lambda row: row.trial.attempts),
    "batch": _Field(lambda row: row.report.batch),
    "trial": _Field(lambda row: row.trial.label),
    "job": _Field(lambda row: row.trial.job),
    "state": _Field(lambda row: row.trial.state.value),
    "reason": _Field(lambda row: row.trial.reason),
    "gpu": _Field(lambda row: row.trial.gpu),
    "worker": _Field(lambda row: row.trial.worker),
}
FILTER = re.compile(r"\s*(?P<key>[\w.]+)\s*(?P<compare>!=|<=|>=|==?|<|>)\s*(?P<value>.*?)\s*")
COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


def rows_of(reports: Sequence[BatchReport]) -> list[Row]:
    """All trials, those of each batch in its order."""
    return [Row(report, trial) for report in reports for trial in report.trials]


def selected(rows: Sequence[Row], filters: Sequence[str], sort: str, reverse: bool) -> list[Row]:
    """The rows for which every filter holds, in the order of `sort`; rows that lack its value come last.

    Raises click.UsageError where a filter or key means nothing.
    """
    every = rows
    for text in filters:
        match = FILTER.fullmatch(text)
        if match is None:
            raise click.UsageError(f"--filter {text!r}: write KEY=VALUE; besides = there are != < > <= >=")
        field = _field(match["key"], every)
        compare, wanted = match["compare"], match["value"]
        if "<" in compare or ">" in compare:
            _check_number(text, wanted)
        rows = [row for row in rows if _holds(field.value(row), compare, wanted)]
    field = _field(sort, every)
    known = [row for row in rows if field.value(row) is not None]
    known.sort(key=lambda row: in_order(field.value(row)), reverse=field.high_first)
    return known[:: -1 if reverse else 1] + [row for row in rows if field.value(row) is None]


def _field(key: str, rows: Sequence[Row]) -> _Field:
    """A field, or a setting by its dotted key or the last part of it."""
    if key in FIELDS:
        return FIELDS[key]
    names = sorted({name for row in rows for name in row.settings})
    meant = [name for name in names if name == key] or [name for name in names if name.endswith(f".{key}")]
    if len(meant) == 1:
        return _Field(lambda row: row.settings.get(meant[0]))
    if meant:
        raise click.UsageError(f"{key!r} can be {' or '.join(meant)}: write one of them")
    close = difflib.get_close_matches(key, [*FIELDS, *names], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "any key of the sweep file is one"
    raise click.UsageError(f"{key!r} is nothing that trials have; there are {', '.join(FIELDS)}, and {hint}")


def _check_number(text: str, wanted: str) -> None:
    try:
        float(wanted)
    except ValueError:
        raise click.UsageError(f"--filter {text!r}: {wanted!r} is no number, and < > <= >= compare numbers") from None


def _holds(value: Any, compare: str, wanted: str) -> bool:
    """Numbers as numbers, everything else by its text; a value that is not there is `none`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return COMPARE[compare](value, float(wanted))
        except ValueError:
            return compare == "!="
    if compare not in ("=", "==", "!="):
        return False
    return COMPARE[compare](shown(value).casefold(), wanted.casefold())


def in_order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, shown(value)


def shown(value: Any) -> str:
    """A setting's value as a label has it: `0.0002`, `true`, `q_proj,v_proj`, and of a path the last part."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2] if "://" in value or value.startswith(("/", ".")) else value
    return json.dumps(value)


def varied(rows: Sequence[Row]) -> list[str]:
    """The dotted keys whose value is not the same in all rows."""
    settings = [row.settings for row in rows]
    names = dict.fromkeys(key for row in rows for key in [*row.trial.differs, *row.settings])
    return [key for key in names if any(shown(have.get(key)) != shown(settings[0].get(key)) for have in settings)]


def _telling(keys: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Without what varies only because some rows lack its whole section: of that, the first key is enough."""
    kept: dict[str, str] = {}  # key -> its section
    for key in keys:
        section = key.rpartition(".")[0]
        values = {shown(value) for row in rows if (value := row.settings.get(key)) is not None}
        if len(values) > 1 or section not in kept.values() or all(_has(row, section) for row in rows):
            kept[key] = section
    return list(kept)


def _has(row: Row, section: str) -> bool:
    return any(value is not None and key.startswith(f"{section}.") for key, value in row.settings.items())


def labels(rows: Sequence[Row]) -> list[str]:
    """What tells each row from the others: within a batch its label, else what differs between the batches too."""
    if len({row.report.batch for row in rows}) <= 1:
        return [row.trial.label or "the only trial" for row in rows]
    keys = _telling(varied(rows), [row for row in rows if not row.trial.members])
    last = [key.rpartition(".")[2] for key in keys]
    names = [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]
    return [
        " ".join(f"{name}={shown(row.settings.get(key))[:MOST_LABEL]}" for key, name in zip(keys, names, strict=True))
        or "the same settings"
        if not row.trial.members
        else f"{row.report.batch}: {row.trial.label}"
        for row in rows
    ]
