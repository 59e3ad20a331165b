"""What the names of a sweep file mean on this machine: data files and chat templates, relative to the file's folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

from jobqueue.data_spec import DataSpec, RowsSpec
from jobqueue.errors import DataError, Problem, SpecError

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".txt")

AnyData = TypeVar("AnyData", bound=RowsSpec)


def data_file(spec: RowsSpec, folder: Path) -> Path | None:
    """The file of this machine that a source names, None for a URL or a hub id. Raises DataError."""
    path = _path(spec.source, folder)
    as_a_path = spec.source.startswith(("/", "./", "../", "~")) or "/" not in spec.source.rstrip("/")
    if as_a_path and path.is_dir():
        do = "Name a file in it. A data set of the hub has its owner in its id: owner/name."
        raise DataError(f"{path} is a folder, not a data file", do)
    if "://" in spec.source or not (path.is_file() or spec.source.endswith(DATA_SUFFIXES)):
        return None
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        do = f"Did you mean {close[0]}?" if close else f"Correct `source: {spec.source}`, or give a hub id."
        raise DataError(f"there is no data file {path}", do)
    return path


def readable(spec: AnyData, folder: Path) -> AnyData:
    """The same data, as this machine can read it. Raises DataError."""
    if isinstance(spec, DataSpec) and spec.replay is not None:
        spec = spec.model_copy(update={"replay": readable(spec.replay, folder)})
    path = data_file(spec, folder)
    return spec if path is None else spec.model_copy(update={"source": str(path)})


def chat_template(given: str | None, sweep_file: Path) -> str | None:
    """A name or Jinja as it is, else what a file of that name holds. Raises SpecError."""
    if given is None:
        return None
    from jobqueue.templates import NAMED, syntax_error  # Jinja: only where it is needed

    if given in NAMED:
        return given
    wrong, source = None, given
    if "{{" not in given and "{%" not in given:
        try:
            source = _path(given, sweep_file.parent).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            wrong = f"{given!r} is neither {', '.join(NAMED)}, nor a file that can be read, nor Jinja"
    wrong = wrong or syntax_error(source)
    if wrong:
        raise SpecError([Problem(wrong, str(sweep_file), path="chat_template")])
    return source


def _path(name: str, folder: Path) -> Path:
    path = Path(name).expanduser()
    return path if path.is_absolute() else folder / path
