"""Read the rows of a data file: JSONL, JSON, CSV or Parquet, gzipped or not, from a path or an fsspec URL.

What a file is, is read off its first bytes where its name does not say it: data that travelled by content
hash has no name. Everything streams, except a JSON array and Parquet.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from jobqueue.errors import DataError, StorageError
from jobqueue.formats import FORMATS, Example, Row, SkipRow, detect
from jobqueue.spec import DataSpec

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
    columns: list[str]
    rows: int
    usable: int
    skipped: dict[str, Skipped]

    def report(self) -> dict[str, Any]:
        skipped = {reason: {"count": s.count, "lines": s.lines} for reason, s in self.skipped.items()}
        return {"format": self.format, "rows": self.rows, "usable": self.usable, "skipped": skipped}


@dataclass(frozen=True)
class Rows:
    """The usable rows of a file, each with its place in it (from 0), and what the file holds."""

    examples: list[tuple[int, Example]]
    summary: Summary


def load(data: DataSpec) -> Rows:
    """Read and convert all rows that `data` asks for. Raises DataError where none is usable."""
    numbered = islice(read(data), data.limit)
    first = list(islice(numbered, DETECT_ROWS))
    if not first:
        raise DataError(f"{data.source} is empty: it has no rows", "Give a file with at least one row.")
    columns = list(dict.fromkeys(key for _, row in first for key in row))
    name = _format(data, columns)

    examples: list[tuple[int, Example]] = []
    skipped: dict[str, Skipped] = {}
    count = 0
    for index, (line, row) in enumerate(chain(first, numbered)):
        count += 1
        try:
            examples.append((index, FORMATS[name].convert(_renamed(row, data))))
        except SkipRow as reason:
            entry = skipped.setdefault(str(reason), Skipped())
            entry.count += 1
            if len(entry.lines) < SHOWN_LINES:
                entry.lines.append(line)
    summary = Summary(name, columns, count, len(examples), skipped)
    if not examples:
        reasons = "; ".join(f"{why} (line {', '.join(map(str, s.lines))})" for why, s in skipped.items())
        raise DataError(
            f"{data.source}: none of its {count} rows can be used as {name}: {reasons}",
            "Correct the rows, or say under `columns` and `format` how the file is laid out.",
        )
    return Rows(examples, summary)


def check_file(data: DataSpec) -> Summary:
    """What a file holds, for a check before anything is submitted. Raises DataError."""
    return load(data).summary


def read(data: DataSpec) -> Iterator[tuple[int, Row]]:
    """Every row with its line number (from 1), as the file has it. Raises DataError."""
    source = data.source
    if "://" not in source and not Path(source).expanduser().exists():
        if source.count("/") == 1 and not source.startswith((".", "~", "/")) and not Path(source).suffix:
            return _hub(data)
        raise DataError(f"{source} does not exist", "Give the path of a file on this machine, a hub id, or a URL.")
    return _file(source)


def _renamed(row: Row, data: DataSpec) -> Row:
    return {**row, **{name: row.get(column) for name, column in data.columns.items()}} if data.columns else row


def _format(data: DataSpec, columns: list[str]) -> str:
    """The format of the rows; DataError where a column that it needs is not there."""
    listed = ", ".join(map(str, columns)) or "none"
    absent = [column for column in data.columns.values() if column not in columns]
    if absent:
        raise DataError(
            f"{data.source} has no column {', '.join(absent)}; its columns are {listed}",
            "Correct the names on the right side of `columns`.",
        )
    present = [*columns, *data.columns]
    if data.format != "auto":
        missing = FORMATS[data.format].missing(present)
        if missing:
            raise DataError(
                f"{data.source} lacks the column {', '.join(missing)}; its columns are {listed}",
                f"Say which column it is, e.g. `columns: {{{missing[0].split()[0]}: {columns[0]}}}`.",
            )
        return data.format
    name = detect(present)
    if name is None:
        layouts = "; ".join(
            f"{name}: {', '.join(' or '.join(group) for group in row_format.needs)}"
            for name, row_format in FORMATS.items()
        )
        raise DataError(
            f"{data.source} has the columns {listed}, which fit no known format",
            f"Name the columns under `columns`, or rename them ({layouts}).",
        )
    return name


def _hub(data: DataSpec) -> Iterator[tuple[int, Row]]:
    """A data set of the Hugging Face hub, through its own library (workers have it)."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{data.source} is no file here, and reading it from the hub needs the package datasets",
            "Check the path, or run this where `pip install loraq[worker]` was done.",
        ) from None
    try:
        rows = load_dataset(data.source, split=data.split)
    except ConnectionError as error:
        raise StorageError(f"{data.source}: the hub does not answer: {error}", "Try again once it does.") from error
    except Exception as error:  # the library raises many kinds for names, splits and formats
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{data.source} (split {data.split}) is no file here and could not be read from the hub: {line}",
            "Check the path or the hub id and its split, and whether this machine reaches the hub.",
        ) from error
    return enumerate(cast(Iterable[Row], rows), start=1)


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    """The plain bytes of a file, unpacked where it is gzipped; what goes wrong in reading is a DataError."""
    try:
        if "://" in source:
            import fsspec  # 0.1 s, and only for URLs

            raw = cast(BinaryIO, fsspec.open(source, "rb").open())
        else:
            raw = Path(source).expanduser().open("rb")
    except ImportError as error:
        raise DataError(f"{source}: {error}", "Install the package that reads this kind of URL.") from error
    except IsADirectoryError as error:
        raise DataError(f"{source} is a folder", "Name the file in it.") from error
    except (FileNotFoundError, PermissionError) as error:
        why = error.strerror or error
        raise DataError(f"{source} cannot be opened: {why}", "Check the path and its rights.") from error
    except OSError as error:
        raise StorageError(f"{source} cannot be read: {error}", "Try again once its storage answers.") from error
    with raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw) if packed else raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{source} is a damaged gzip file: {error}", "Write or copy it again.") from error


def _file(source: str) -> Iterator[tuple[int, Row]]:
    with _opened(source) as file:
        head = file.read(4096)
        file.seek(0)
        if head[:4] == b"PAR1":
            yield from _parquet(source, file)
        elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{source} is UTF-16", "Convert it: `iconv -f utf-16 -t utf-8 FILE > NEW`.")
        elif _is_csv(source, head):
            yield from _csv(source, file)
        elif head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _json_array(source, file)
        else:
            yield from _jsonl(source, file)


def _is_csv(source: str, head: bytes) -> bool:
    name = source.removesuffix(".gz").lower()
    if name.endswith((".csv", ".tsv")):
        return True
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return False
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"{", b"[", b"")


def _not_utf8(source: str, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{source}:{line}: not UTF-8 (byte 0x{byte:02x})",
        "Convert the file, e.g. `iconv -f latin1 -t utf-8 FILE > NEW`.",
    )


def _jsonl(source: str, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    for number, raw in enumerate(file, start=1):
        try:
            line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).decode().strip()
        except UnicodeDecodeError as error:
            raise _not_utf8(source, number, error) from error
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{source}:{number}: not JSON: {error}",
                "One JSON object per line is expected; correct or remove this line.",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{source}:{number}: a {type(row).__name__}, not an object",
                'One JSON object per line is expected: {"question": ..., "options": ..., "answer": ...}.',
            )
        yield number, row


def _json_array(source: str, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(source, error.object[: error.start].count(b"\n") + 1, error) from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"{source}:{line}: not JSON: {error}", "The file begins as a JSON array; correct it there."
        ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{source}: item {number} is a {type(row).__name__}, not an object", "Correct that item.")
        yield number, row


def _csv(source: str, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """The csv module keeps values as text: an answer "NA" or "None" stays what it is. An empty cell is null."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    delimiter = "\t" if source.removesuffix(".gz").lower().endswith(".tsv") else ","
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        doubled = {name for name in header if header.count(name) > 1}
        if doubled:
            raise DataError(f"{source}:1: the column {', '.join(sorted(doubled))} occurs twice", "Rename one of them.")
        for cells in reader:
            if len(cells) > len(header):
                raise DataError(
                    f"{source}:{reader.line_num}: {len(cells)} values for {len(header)} columns",
                    "Put values that hold a comma into double quotes.",
                )
            if cells:
                yield reader.line_num, dict(zip(header, (cell or None for cell in cells), strict=False))
    except UnicodeDecodeError as error:
        raise _not_utf8(source, reader.line_num + 1, error) from error
    except csv.Error as error:
        raise DataError(f"{source}:{reader.line_num}: not CSV: {error}", "Correct this line.") from error


def _parquet(source: str, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow.parquet as parquet  # comes with loraq[worker]
    except ImportError:
        raise DataError(
            f"{source} is a Parquet file, and pyarrow, which reads it, is not installed here",
            "Run `pip install pyarrow`, or convert the file to JSONL.",
        ) from None
    try:
        table = parquet.ParquetFile(file)
        batches = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches())
        yield from enumerate(batches, start=1)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{source} is a damaged Parquet file: {error}", "Write or copy it again.") from error
