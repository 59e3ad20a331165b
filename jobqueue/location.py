"""One fsspec location, a folder or an object store: files appear there whole or not at all."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobqueue.errors import NotFoundError, StorageError

if TYPE_CHECKING:
    import fsspec

MARK = "storage.json"


class Stretch(NamedTuple):
    """A part of a file."""

    file: str  # relative to the storage
    start: int  # bytes
    size: int


class Location:
    """A folder, or whatever the URL names. Raises StorageError where it cannot be read or written."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        with self._errors("open"):
            fs, root = url_to_fs(url, use_listings_cache=False)  # other hosts write there as well
        self._fs: fsspec.AbstractFileSystem = fs
        self._root: str = root.rstrip("/")
        self._pinned = False

    @property
    def local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._fs, LocalFileSystem)

    def address(self, relative: str) -> str:
        """A URL, or a path where the storage is a folder, that `fsspec.open` reads."""
        path = f"{self._root}/{relative}"
        return path if self.local else self._fs.unstrip_protocol(path)

    def pin(self) -> None:
        """From now on it must keep its mark: where a mount has gone, the folder below it can be written as well.

        Raises StorageError where the mark has gone.
        """
        if not self._pinned and not self.exists(MARK):
            self.write_text(MARK, json.dumps({"loraq": "storage", "layout": 1}))  # the same, whoever is first
        self._pinned = True
        self._check()

    def _check(self) -> None:
        if self._pinned and not self.exists(MARK):
            raise StorageError(
                f"the storage {self.url} has lost its {MARK}: it is not mounted, or was emptied",
                "Mount it again; if it was emptied on purpose, start the workers again.",
            )

    def exists(self, relative: str) -> bool:
        with self._errors("read"):
            return bool(self._fs.exists(f"{self._root}/{relative}"))

    def _names(self, folder: str) -> list[str]:
        path = f"{self._root}/{folder}"
        if not self._fs.exists(path):
            return []
        return [entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(path, detail=False)]

    def fetch(self, folder: str, into: Path) -> Path:
        """A copy of a folder of the storage, also where that is a mount: it may go, or hang, while a trainer reads."""
        with self._errors("read"):
            self._fs.get(f"{self._root}/{folder}/", f"{into}/", recursive=True)
        return into

    def read_text(self, relative: str) -> str:
        with self._errors("read"):
            try:
                return str(self._fs.cat_file(f"{self._root}/{relative}").decode())
            except FileNotFoundError:
                raise NotFoundError(f"{relative} is not in the storage {self.url}") from None

    def read_texts(self, folder: str, names: Iterable[str]) -> dict[str, str]:
        """The content of those of these files that a folder has, by name."""
        with self._errors("read"):
            there = sorted({*names} & {*self._names(folder)})
        return {name: self.read_text(f"{folder}/{name}") for name in there}

    def read_part(self, part: Stretch) -> tuple[int, bytes]:
        """How long the whole file is, and the part, as far as the file goes. Raises NotFoundError."""
        path = f"{self._root}/{part.file}"
        with self._errors("read"):
            try:
                return int(self._fs.size(path)), bytes(self._fs.cat_file(path, part.start, part.start + part.size))
            except FileNotFoundError:
                raise NotFoundError(f"{part.file} is not in the storage {self.url}") from None

    def read_parts(self, wanted: Iterable[Stretch], waits: Callable[[str], None]) -> Generator[bytes, None, None]:
        """The content of each, see `published.Source`."""
        for part in wanted:
            yield self.read_part(part)[1]

    def holds(self, folder: str, name: str) -> bool:
        """Whether a file of that name in a folder would be its own: no link leads out of it."""
        self._check()
        if not self.local:
            return True
        with self._errors("read"):
            top, file = (Path(self.address(path)).resolve() for path in (folder, f"{folder}/{name}"))
            return file.is_relative_to(top) and file.is_file()

    def write_text(self, relative: str, text: str) -> None:
        """Appears whole or not at all."""
        self._write(relative, text.encode())

    def _write(self, relative: str, content: bytes) -> None:
        target = f"{self._root}/{relative}"
        with self._errors("write"):
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._whole(target, lambda part: self._fs.pipe_file(part, content))

    def _put(self, path: Path, target: str) -> None:
        self._whole(target, lambda part: self._fs.put_file(str(path), part))

    def _whole(self, target: str, write: Callable[[str], object]) -> None:
        """Writes under another name first, so that what is half-written is never taken for the file."""
        part = f"{target}.{uuid.uuid4().hex}.part"  # its own, as others may write the same
        try:
            write(part)
            self._fs.mv(part, target)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(part)
            raise

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (StorageError, NotFoundError):
            raise
        except ImportError as error:
            raise StorageError(
                f"the storage {self.url} needs a package that is missing: {error}",
                "Install it on this machine.",
            ) from error
        except (OSError, ValueError) as error:
            raise StorageError(
                f"cannot {verb} in the storage {self.url}: {error}",
                "Check that it is mounted and writable, and that LORAQ_STORAGE is right.",
            ) from error
