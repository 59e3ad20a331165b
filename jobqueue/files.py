"""The rows of one data file: JSONL, JSON, CSV, TSV or Parquet, packed with gzip or zstd or not, by path or fsspec URL.

What a file is, is read off its first bytes where its name does not say it: data that travelled by content hash may
have no name. Everything streams, except JSON documents and Parquet. Lines that cannot be read are reported together.
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
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from jobqueue.errors import DataError, StorageError
from jobqueue.example import Row
from jobqueue.formats import detect

SHOWN_PROBLEMS = 10  # of one file
BUFFER = 1 << 16  # bytes
HEAD = 4096  # bytes by which a file is recognised
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # first bytes
NEWLINE = b"\n"
UTF8_MARK = b"\xef\xbb\xbf"
# What others pack files with: the first bytes, and what unpacks them.
UNREADABLE = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"7z": "a 7z archive",
}
# The package that reads a kind of URL.
URL_PACKAGES = {
    "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs",
    "http": "aiohttp", "https": "aiohttp",
}  # fmt: skip


def read_file(source: str) -> Iterator[tuple[int, Row]]:
    """Every row with its line number (Parquet and JSON documents: its number), from 1. Raises DataError."""
    with _opened(source) as file:
        head = file.peek(HEAD)[:HEAD]
        text = head.removeprefix(UTF8_MARK).lstrip()
        foreign = next((what for magic, what in UNREADABLE.items() if head.startswith(magic)), None)
        if foreign:
            raise DataError(f"{source} is {foreign}", "Unpack it, or pack it with gzip or zstd.")
        if head[:4] == b"PAR1":
            yield from _parquet(source, file)
        elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{source} is UTF-16", "Convert it: `iconv -f utf-16 -t utf-8 FILE > NEW`.")
        elif b"\0" in head:
            raise DataError(
                f"{source} is no text: it has zero bytes", "Give JSONL, JSON, CSV, TSV or Parquet, in UTF-8."
            )
        elif _is_csv(source, text):
            yield from _csv(source, file)
        elif text[:1] == b"[" or (text[:1] == b"{" and _plain_name(source).endswith(".json")):
            yield from _json(source, file)
        else:
            yield from _jsonl(source, file)


@contextmanager
def _opened(source: str) -> Iterator[io.BufferedReader]:
    """The plain bytes of a file, unpacked where it is packed; what goes wrong in reading is a DataError."""
    with _raw(source) as raw:
        packed = io.BufferedReader(cast(io.RawIOBase, raw), BUFFER)  # peeks, as not every URL can be sought in
        magic = packed.peek(4)[:4]
        try:
            yield io.BufferedReader(cast(io.RawIOBase, _unpacked(source, cast(BinaryIO, packed), magic)), BUFFER)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            kind = "zstd" if magic == ZSTD else "gzip"
            raise DataError(f"{source} is a damaged {kind} file: {error}", "Write or copy it again.") from error
        except OSError as error:
            raise StorageError(f"{source} cannot be read: {error}", AGAIN) from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # the package may not be there
                raise
            raise DataError(f"{source} is a damaged zstd file: {error}", "Write or copy it again.") from error


def _raw(source: str) -> BinaryIO:
    protocol, separator, _ = source.partition("://")
    try:
        if not separator:
            return Path(source).expanduser().open("rb")
        import fsspec  # 0.1 s, and only for URLs

        return cast(BinaryIO, fsspec.open(source, "rb").open())
    except ImportError as error:
        package = URL_PACKAGES.get(protocol, "the package that reads this kind of URL")
        raise DataError(f"{source}: {error}", f"Install {package} on the workers.") from error
    except IsADirectoryError as error:
        raise DataError(f"{source} is a folder", "Name the file in it.") from error
    except (FileNotFoundError, PermissionError) as error:
        why = error.strerror or error
        if isinstance(error.__cause__, OSError):  # fsspec calls a host that does not answer a missing file
            raise StorageError(f"{source} cannot be read: {error.__cause__}", AGAIN) from error
        raise DataError(f"{source} cannot be opened: {why}", "Check the path and its rights.") from error
    except ValueError as error:  # a protocol that fsspec does not know
        raise DataError(
            f"{source}: {error}", "Give a path, a hub id, or a URL such as s3://, gs://, https://, hf://."
        ) from error
    except Exception as error:  # every file system has errors of its own
        line = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{source} cannot be read: {line}", AGAIN) from error


def _unpacked(source: str, raw: BinaryIO, magic: bytes) -> BinaryIO:
    if magic[:2] == GZIP:
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if magic != ZSTD:
        return raw
    try:
        from backports.zstd import ZstdFile  # comes with loraq[data] and loraq[worker]; Python has it from 3.14 on
    except ImportError:
        raise DataError(
            f"{source} is packed with zstd, and backports.zstd, which unpacks it, is not installed here",
            "Run `pip install 'loraq[data]'`, or pack the file with gzip.",
        ) from None
    return cast(BinaryIO, ZstdFile(raw))


def _plain_name(source: str) -> str:
    return source.lower().removesuffix(".gz").removesuffix(".zst")


def _is_csv(source: str, text: bytes) -> bool:
    name = _plain_name(source)
    if name.endswith((".csv", ".tsv")):
        return True
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return False
    return text[:1] not in (b"{", b"[", b"")


class _Problems:
    """What is wrong with the lines of a file; the first of them are said all at once."""

    def __init__(self, source: str, do: str) -> None:
        self.source, self.do = source, do
        self.lines: list[str] = []
        self.count = 0

    def add(self, line: int, what: str, do: str = "") -> None:
        self.count += 1
        if len(self.lines) < SHOWN_PROBLEMS:
            self.lines.append(f"{self.source}:{line}: {what}")
            self.do = do or self.do

    def check(self) -> None:
        """Raises DataError where there is any."""
        if not self.count:
            return
        more = self.count - len(self.lines)
        raise DataError("\n".join([*self.lines, *([f"and {more} more lines"] if more else [])]), self.do)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(UTF8_MARK)), dict)
    except (ValueError, RecursionError):
        return False


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"


AGAIN = "Try again once its storage answers."
CONVERT = "Convert the file, e.g. `iconv -f latin1 -t utf-8 FILE > NEW`."


def _jsonl(source: str, file: Iterable[bytes]) -> Iterator[tuple[int, Row]]:
    problems = _Problems(source, "One JSON object per line is expected; correct or remove these lines.")
    for number, raw in enumerate(file, start=1):
        try:
            line = (raw.removeprefix(UTF8_MARK) if number == 1 else raw).decode().strip()
        except UnicodeDecodeError as error:
            problems.add(number, _bad_byte(error), CONVERT)
            continue
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            cut_off = not raw.endswith(b"\n") and number > 1
            what = "the last line is cut off" if cut_off else "not JSON"
            problems.add(number, f"{what}: {error}", "Write or copy the file again." if cut_off else "")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.add(number, f"a {type(row).__name__}, not an object")
    problems.check()


def _json(source: str, file: io.BufferedReader) -> Iterator[tuple[int, Row]]:
    """A list of objects, an object that holds one such list, or objects line by line under the wrong name."""
    content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}:{error.object[: error.start].count(NEWLINE) + 1}: {_bad_byte(error)}", CONVERT
        ) from error
    except (ValueError, RecursionError) as error:
        if _is_object(content.partition(NEWLINE)[0]):
            yield from _jsonl(source, io.BytesIO(content))
            return
        raise DataError(
            f"{source}:{getattr(error, 'lineno', 1)}: not JSON: {error}",
            "The file begins as a JSON document; correct it there.",
        ) from error
    if isinstance(rows, dict) and detect(rows):
        rows = [rows]
    elif isinstance(rows, dict):
        lists = {key: value for key, value in rows.items() if isinstance(value, list) and value}
        if len(lists) != 1:
            held = f"the lists {', '.join(lists)}" if lists else "no list"
            raise DataError(
                f"{source} is one JSON object with {held}, where one list of rows is expected",
                "Write the rows as JSONL, one object per line, or as one list.",
            )
        rows = next(iter(lists.values()))
    problems = [
        f"{source}: item {number} is a {type(row).__name__}, not an object"
        for number, row in enumerate(rows, start=1)
        if not isinstance(row, dict)
    ]
    if problems:
        raise DataError("\n".join(problems[:SHOWN_PROBLEMS]), "Correct these items.")
    yield from enumerate(rows, start=1)


def _csv(source: str, file: io.BufferedReader) -> Iterator[tuple[int, Row]]:
    """The csv module keeps values as text: an answer "NA" or "None" stays what it is. An empty cell is null."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    delimiter = "\t" if _plain_name(source).endswith(".tsv") else ","
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    problems = _Problems(source, "Put values that hold a comma into double quotes.")
    try:
        header = next(reader, [])
        doubled = {name for name in header if header.count(name) > 1}
        if doubled:
            raise DataError(f"{source}:1: the column {', '.join(sorted(doubled))} occurs twice", "Rename one of them.")
        for cells in reader:
            if len(cells) > len(header):
                problems.add(reader.line_num, f"{len(cells)} values for {len(header)} columns")
            elif cells:
                yield reader.line_num, dict(zip(header, (cell or None for cell in cells), strict=False))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}:{reader.line_num + 1}: {_bad_byte(error)}", CONVERT) from error
    except csv.Error as error:
        raise DataError(f"{source}:{reader.line_num}: not CSV: {error}", "Correct this line.") from error
    problems.check()


def _parquet(source: str, file: io.BufferedReader) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow.parquet as parquet  # comes with loraq[data] and loraq[worker]
    except ImportError:
        raise DataError(
            f"{source} is a Parquet file, and pyarrow, which reads it, is not installed here",
            "Run `pip install pyarrow`, or convert the file to JSONL.",
        ) from None
    try:
        table = parquet.ParquetFile(file)
        batches: Iterator[dict[str, Any]] = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches())
        yield from enumerate(batches, start=1)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{source} is a damaged Parquet file: {error}", "Write or copy it again.") from error
