"""The rows that a spec asks for, from a file or the hub, converted; those that cannot be used are counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from jobqueue.data_spec import DataSpec, RowsSpec, RowTemplate
from jobqueue.errors import DataError, MachineError, StorageError
from jobqueue.example import Example, Row, SkipRow
from jobqueue.files import read_file
from jobqueue.formats import FORMATS, RowFormat, detect, templated

log = logging.getLogger("loraq.data")
SHOWN_LINES = 5  # of the rows skipped for one reason
DETECT_ROWS = 100  # columns are looked for in the first so many rows


@dataclass
class Skipped:
    """Rows that could not be used, for one reason."""

    count: int = 0
    lines: list[int] = field(default_factory=list)
    """Line numbers (Parquet, hub: row numbers) of the first of them, from 1."""


@dataclass(frozen=True)
class Summary:
    """What a file holds."""

    format: str
    reason: str
    """How the format was found, e.g. "multiple_choice: columns question, options, answer"."""
    columns: list[str]
    rows: int
    usable: int
    skipped: dict[str, Skipped]

    def report(self) -> dict[str, Any]:
        skipped = {reason: {"count": s.count, "lines": s.lines} for reason, s in self.skipped.items()}
        return {
            "format": self.format,
            "format_reason": self.reason,
            "rows": self.rows,
            "usable": self.usable,
            "skipped": skipped,
        }


@dataclass(frozen=True)
class Checked(Summary):
    """The same, of a file to train on, and what a training would see of it."""

    trained: int
    """Usable rows that are not kept back."""
    duplicates: int
    """Of them, those that say the same as an earlier one."""


@dataclass(frozen=True)
class Rows:
    """The usable rows of a file, each with its place in it (from 0), why the others are not, and what it holds."""

    examples: list[tuple[int, Example]]
    unusable: dict[int, str]
    summary: Summary


def load(data: RowsSpec) -> Rows:
    """Read and convert all rows that `data` asks for. Raises DataError where none is usable."""
    numbered = islice(read(data), data.limit)
    first = list(islice(numbered, DETECT_ROWS))
    columns = _columns(first)
    if data.format == "auto" and not _template(data) and not detect([*columns, *data.columns]):
        first += numbered  # a column may come late
        columns = _columns(first)
    if not first:
        raise DataError(f"{data.source} is empty: it has no rows", "Give a file with at least one row.")
    name, row_format, reason = _format(data, columns)

    examples: list[tuple[int, Example]] = []
    unusable: dict[int, str] = {}
    skipped: dict[str, Skipped] = {}
    count = 0
    for index, (line, row) in enumerate(chain(first, numbered)):
        count += 1
        try:
            examples.append((index, row_format.convert(_renamed(row, data)).with_system(data.system_prompt)))
        except SkipRow as why:
            unusable[index] = str(why)
            entry = skipped.setdefault(str(why), Skipped())
            entry.count += 1
            if len(entry.lines) < SHOWN_LINES:
                entry.lines.append(line)
    summary = Summary(name, reason, columns, count, len(examples), skipped)
    if not examples:
        reasons = "; ".join(f"{why} (line {', '.join(map(str, s.lines))})" for why, s in skipped.items())
        raise DataError(
            f"{data.source}: none of its {count} rows can be used as {name}: {reasons}",
            "Correct the rows, or say under `columns` and `format` how the file is laid out.",
        )
    return Rows(examples, unusable, summary)


def split(data: DataSpec, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those kept back for validation.

    A row's side follows from what it says and from the seed alone: the order of the file does not matter, rows that
    are added later leave the others where they are, and equal rows are never on both sides. Raises DataError where
    one side would be empty.
    """
    if data.validation_split is None:
        return examples, []
    seed = data.validation_seed.to_bytes(8, "big")
    kept_back = [
        int.from_bytes(hashlib.sha256(seed + example.key).digest()[:8], "big") < data.validation_split * 2**64
        for example in examples
    ]
    sides = (
        [e for e, kept in zip(examples, kept_back, strict=True) if not kept],
        [e for e, kept in zip(examples, kept_back, strict=True) if kept],
    )
    if not all(sides):
        side = "validate on" if sides[0] else "train on"
        raise DataError(
            f"{data.source}: validation_split {data.validation_split:g} of {len(examples)} rows leaves none to {side}",
            "Give more rows, another share, or another validation_seed.",
        )
    return sides


def check_file(data: RowsSpec) -> Checked:
    """What a file holds, for a check before anything is submitted. Raises DataError."""
    loaded = load(data)
    trained = [example for _, example in loaded.examples]
    duplicates = 0
    if isinstance(data, DataSpec):
        trained = split(data, trained)[0]
        duplicates = len(trained) - len({example.key for example in trained})
    return Checked(**vars(loaded.summary), trained=len(trained), duplicates=duplicates)


def read(data: RowsSpec) -> Iterator[tuple[int, Row]]:
    """Every row with its line number (from 1), as the file has it. Raises DataError."""
    source = data.source
    if "://" not in source and not Path(source).expanduser().exists():
        if source.count("/") == 1 and not source.startswith((".", "~", "/")) and not Path(source).suffix:
            return _hub(data)
        raise DataError(f"{source} does not exist", "Give the path of a file on this machine, a hub id, or a URL.")
    if data.name or data.revision:
        raise DataError(f"{source} is a file; name and revision are of data sets of the hub", "Leave them out.")
    return read_file(source)


def _columns(numbered: list[tuple[int, Row]]) -> list[str]:
    return list(dict.fromkeys(str(key) for _, row in numbered for key in row))


def _renamed(row: Row, data: RowsSpec) -> Row:
    return {**row, **{name: row.get(column) for name, column in data.columns.items()}} if data.columns else row


def _format(data: RowsSpec, columns: list[str]) -> tuple[str, RowFormat, str]:
    """The format of the rows, and why; DataError where a column that it needs is not there."""
    listed = ", ".join(columns) or "none"
    absent = [column for column in data.columns.values() if column not in columns]
    if absent:
        raise DataError(
            f"{data.source} has no column {', '.join(absent)}; its columns are {listed}",
            "Correct the names on the right side of `columns`.",
        )
    present = [*columns, *data.columns]
    template = _template(data)
    if template:
        return "template", _checked(templated(template), data, present), "template: as data.template says"
    if data.format != "auto":
        return data.format, _checked(FORMATS[data.format], data, present), f"{data.format}: as data.format says"
    name = detect(present)
    if name is None:
        layouts = "; ".join(
            f"{name}: {', '.join(' or '.join(group) for group in row_format.needs)}"
            for name, row_format in FORMATS.items()
        )
        raise DataError(
            f"{data.source} has the columns {listed}, which fit no known format",
            f"Name the columns under `columns`, rename them ({layouts}), or write a `template`.",
        )
    others = [other for other, row_format in FORMATS.items() if other != name and not row_format.missing(present)]
    doubt = f" ({', '.join(others)} would fit too; `format` chooses)" if others else ""
    return name, FORMATS[name], f"{name}: columns {', '.join(FORMATS[name].found(present))}{doubt}"


def _template(data: RowsSpec) -> RowTemplate | None:
    return data.template if isinstance(data, DataSpec) else None


def _checked(row_format: RowFormat, data: RowsSpec, present: list[str]) -> RowFormat:
    """The format, if the file has the columns that it needs."""
    missing = row_format.missing(present)
    if not missing:
        return row_format
    column = missing[0].split()[0]
    advice = f"Say which column it is, e.g. `columns: {{{column}: {present[0]}}}`."
    raise DataError(
        f"{data.source} lacks the column {', '.join(missing)}; its columns are {', '.join(present)}",
        "Correct the names in `template`." if _template(data) else advice,
    )


def _hub(data: RowsSpec) -> Iterator[tuple[int, Row]]:
    """A data set of the Hugging Face hub, through its own library (workers have it)."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MachineError(
            f"{data.source} is no file here, and reading it from the hub needs the package datasets",
            "Check the path, or run this where `pip install loraq[worker]` was done.",
        ) from None
    with TemporaryDirectory(prefix="loraq-data-") as own:
        yield from enumerate(_from_hub(load_dataset, data, own), start=1)


def _from_hub(load_dataset: Callable[..., Any], data: RowsSpec, own_cache: str) -> Iterable[Row]:
    """The rows. Jobs share the library's cache, and its locks do nothing on some network file systems: where another
    job is in the way, they are read once more into a cache of this reading's own."""
    try:
        try:
            return cast(Iterable[Row], load_dataset(data.source, data.name, split=data.split, revision=data.revision))
        except ConnectionError:
            raise
        except Exception as error:  # the library raises many kinds, for races as for wrong names
            log.info("%s: not to be had from the shared cache (%s)", data.source, _line(error))
        rows = load_dataset(data.source, data.name, split=data.split, revision=data.revision, cache_dir=own_cache)
        return cast(Iterable[Row], rows)
    except ConnectionError as error:
        raise StorageError(f"{data.source}: the hub does not answer: {error}", "Try again once it does.") from error
    except Exception as error:
        part = ", ".join(f"{key} {value}" for key, value in (("name", data.name), ("revision", data.revision)) if value)
        raise DataError(
            f"{data.source} ({f'{part}, ' if part else ''}split {data.split}) is no file here and could not be read "
            f"from the hub: {_line(error)}",
            "Check the path or the hub id, its name, revision and split, and whether this machine reaches the hub.",
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
