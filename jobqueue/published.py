"""What a job has published, as it is read from afar: which files of the storage these are, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field, TypeAdapter

from jobqueue.errors import StorageError
from jobqueue.location import Stretch
from jobqueue.storage import MANIFEST

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
ATTEMPT = re.compile(rf"(?:batches/{_NAME}|evaluations)/{_NAME}/[0-9]+-[A-Za-z0-9]+")
ARCHIVE = re.compile(rf"batches/{_NAME}/archive\.json")
Waits = Callable[[str], None]
"""Called with why nothing comes, "" once something does."""


class Source(Protocol):
    """What gives files of the storage: itself, or a control worker by way of the server."""

    def read_text(self, relative: str) -> str:
        """All of a file. Raises NotFoundError, StorageError."""

    def read_parts(self, wanted: Sequence[Stretch], waits: Waits) -> Generator[bytes, None, None]:
        """The content of each, in this order; what lies behind the end of a file is missing."""


@dataclass(frozen=True)
class Listed:
    """A file as a manifest lists it."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


def split(path: str) -> tuple[str, str]:
    """The attempt's folder that a file of the storage lies in, and its name there; ("", "") where it lies in none."""
    found = ATTEMPT.match(path)
    if found is None or path[found.end() : found.end() + 1] != "/":
        return "", ""
    name = path[found.end() + 1 :]
    return (found[0], name) if is_plain(name) else ("", "")


def is_plain(name: str) -> bool:
    """Whether it names something below the folder that it is joined to, wherever that is, and prints as it is."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and "\\" not in name and name.isprintable()


def listed(source: Source, folder: str) -> dict[str, Listed]:
    """The files of a complete folder, by name. Raises NotFoundError where it is not complete, StorageError."""
    file = f"{folder}/{MANIFEST}"
    if not ATTEMPT.fullmatch(folder):
        raise StorageError(f"{folder!r} is no folder of a job", "Its record is damaged; nothing was copied.")
    text = source.read_text(file)
    try:
        found = TypeAdapter(dict[str, Listed]).validate_python(json.loads(text)["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{file} is no manifest: {error}".partition("\n")[0], "Look after the storage.") from error
    strange = [name for name in found if not is_plain(name)]
    if strange:
        raise StorageError(f"{file} lists {strange[0]!r}, which is no file of that folder", "Look after the storage.")
    return found
