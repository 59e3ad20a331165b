"""Shared storage: one fsspec location, written so that nothing half-done is ever taken for done.

storage.json                                       a mark: the empty folder below a mount has none
trials/<random>                                    of workers that see whether they can write
blobs/<sha256>/<name>                              data that was submitted, by content
batches/<batch>/archive.json                       its records, once it has left the server
batches/<batch>/<job>/<attempt>-<nonce>/...        what one attempt made; only that attempt writes there
incoming/<sha256>/<number>                         pieces of a file that is on its way from a machine without storage
judgements/<judge>/<question>.json                 what a judge said of one answer, for all who ask it the same
evaluations/<job>/<attempt>-<nonce>/...            the same for evaluations of base models
.../manifest.json                                  written last: with it, and only with it, the folder counts
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobqueue.errors import NotFoundError, StorageError
from jobqueue.job import Claim

if TYPE_CHECKING:
    import fsspec

MANIFEST = "manifest.json"
MARK = "storage.json"
BLOB = "loraq://"  # a source in storage, by content: loraq://<sha256>/<name>


class Stretch(NamedTuple):
    """A part of a file."""

    file: str  # relative to the storage
    start: int  # bytes
    size: int


@dataclass(frozen=True)
class Published:
    """A complete folder."""

    folder: str  # relative to the storage
    manifest: Mapping[str, Any]


def file_hash(path: Path) -> str:
    """sha256 of the content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blob_source(path: Path) -> str:
    """What a spec calls a local file once it was submitted."""
    return f"{BLOB}{file_hash(path)}/{path.name}"


def job_folder(job_id: str, batch: str) -> str:
    return f"batches/{batch}/{job_id}" if batch else f"evaluations/{job_id}"


def attempt_folder(claim: Claim) -> str:
    return f"{job_folder(claim.job_id, claim.batch)}/{claim.attempt}-{claim.nonce}"


class Storage:
    """The shared storage at an fsspec URL or a folder. Raises StorageError where it cannot be read or written."""

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

    def try_out(self) -> None:
        """Writes a file, reads it back, and removes it. Raises StorageError where any of that does not work."""
        name, content = f"trials/{uuid.uuid4().hex}", "loraq was here\n"
        self.pin()
        self.write_text(name, content)
        written = self.read_text(name)
        self.remove(name)
        if written != content:
            raise StorageError(
                f"the storage {self.url} gives back something else than what was written", "Look after the storage."
            )

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

    def put_blob(self, path: Path, source: str) -> None:
        """Uploads a submitted file, unless it is there already."""
        if self.has_blob(source, path.stat().st_size):
            return
        target = f"{self._root}/blobs/{source.removeprefix(BLOB)}"
        with self._errors("write"):
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._put(path, target)

    def has_blob(self, source: str, size: int) -> bool:
        """Whether a submitted file is there, whole."""
        target = f"{self._root}/blobs/{source.removeprefix(BLOB)}"
        with self._errors("read"):
            return bool(self._fs.exists(target) and self._fs.size(target) == size)

    def put_piece(self, sha256: str, number: int, content: bytes) -> None:
        """A piece of a file that is on its way."""
        self._check()
        self._write(f"incoming/{sha256}/{number:06d}", content)

    def pieces(self, sha256: str) -> set[int]:
        """The numbers of the pieces that have arrived."""
        with self._errors("read"):
            return {int(name) for name in self._names(f"incoming/{sha256}") if name.isdecimal()}

    def join_pieces(self, source: str, count: int) -> None:
        """Makes a submitted file of its pieces, and removes these. Raises StorageError where it is not that file."""
        sha256 = source.removeprefix(BLOB).partition("/")[0]
        folder, target = f"{self._root}/incoming/{sha256}", f"{self._root}/blobs/{source.removeprefix(BLOB)}"
        part, found = f"{target}.{uuid.uuid4().hex}.part", hashlib.sha256()
        self._check()
        with self._errors("write"):
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            with self._fs.open(part, "wb") as file:
                for number in range(count):
                    content = self._fs.cat_file(f"{folder}/{number:06d}")
                    found.update(content)
                    file.write(content)
            if found.hexdigest() == sha256:
                self._fs.mv(part, target)
            else:
                self._fs.rm_file(part)
            self._fs.rm(folder, recursive=True)
        if found.hexdigest() != sha256:
            raise StorageError(
                "what arrived is not the file that was announced", "It changed on its way; submit again."
            )

    def publish(self, local: Path, folder: str, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        """Copies everything below `local` into `folder`, then writes the manifest with each file's hash and size.

        What was copied before an error is removed again, as far as that is possible: the storage may be full.
        """
        self._check()
        files: dict[str, dict[str, Any]] = {}
        with self._errors("write"), self._undone(f"{self._root}/{folder}", files):
            for path in sorted(p for p in local.rglob("*") if p.is_file()):
                name = path.relative_to(local).as_posix()
                target = f"{self._root}/{folder}/{name}"
                self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                self._put(path, target)
                files[name] = {"sha256": file_hash(path), "bytes": path.stat().st_size}
            full = {**manifest, "files": files}
            self._check()
            self.write_text(f"{folder}/{MANIFEST}", json.dumps(full, indent=1))
        return full

    @contextmanager
    def _undone(self, folder: str, files: Mapping[str, object]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for name in files:
                with suppress(Exception):
                    self._fs.rm_file(f"{folder}/{name}")
            raise

    def intact(self, found: Published) -> bool:
        """Whether every file of a complete folder is there and as long as its manifest says: a host that lost its
        power, or a storage that did, may have kept the one and not the other."""
        with self._errors("read"):
            for name, file in found.manifest["files"].items():
                path = f"{self._root}/{found.folder}/{name}"
                if not self._fs.exists(path) or self._fs.size(path) != file["bytes"]:
                    return False
        return True

    def published(self, job_id: str, batch: str, submission: str = "") -> Published | None:
        """The newest complete folder of a job; with a `submission`, only what that one made.

        A server that was emptied gives names and attempt numbers again: its storage may hold another job's work.
        """
        self._check()
        with self._errors("read"):
            for attempt in self._attempts(job_id, batch):
                found = self._complete(attempt, submission)
                if found is not None:
                    return found
        return None

    def checkpoints(self, job_id: str, batch: str, submission: str) -> list[Published]:
        """The complete checkpoints of all attempts of a job, the one with most steps first."""
        self._check()
        with self._errors("read"):
            folders = [f"{attempt}/checkpoints" for attempt in self._attempts(job_id, batch)]
            names = [f"{folder}/{name}" for folder in folders for name in self._names(folder)]
            found = [self._complete(name, submission) for name in names]
        return sorted((p for p in found if p is not None), key=lambda p: int(p.manifest["step"]), reverse=True)

    def remove(self, folder: str) -> None:
        """A folder and all in it, the manifest first: from then on it does not count."""
        with self._errors("write"):
            path = f"{self._root}/{folder}"
            if self._fs.exists(f"{path}/{MANIFEST}"):
                self._fs.rm_file(f"{path}/{MANIFEST}")
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def _attempts(self, job_id: str, batch: str) -> list[str]:
        """The folders of a job's attempts, the newest first."""
        base = job_folder(job_id, batch)
        # no .nfs0001, no .DS_Store
        names = [name for name in self._names(base) if name.partition("-")[0].isdigit()]
        return [f"{base}/{name}" for name in sorted(names, key=lambda n: int(n.split("-")[0]), reverse=True)]

    def _names(self, folder: str) -> list[str]:
        path = f"{self._root}/{folder}"
        if not self._fs.exists(path):
            return []
        return [entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(path, detail=False)]

    def _complete(self, folder: str, submission: str) -> Published | None:
        if not self._fs.exists(f"{self._root}/{folder}/{MANIFEST}"):
            return None
        manifest = json.loads(self.read_text(f"{folder}/{MANIFEST}"))
        return Published(folder, manifest) if not submission or manifest.get("submission") == submission else None

    def fetch(self, folder: str, into: Path) -> Path:
        """A copy of a folder of the storage, also where that is a mount: it may go, or hang, while a trainer reads."""
        with self._errors("read"):
            self._fs.get(f"{self._root}/{folder}/", f"{into}/", recursive=True)
        return into

    def fetch_source(self, source: str, into: Path) -> str:
        """A spec's data source as this machine can read it; what was submitted is copied below `into`."""
        if not source.startswith(BLOB):
            return source
        sha256, _, name = source.removeprefix(BLOB).partition("/")
        return str(self.fetch(f"blobs/{sha256}", into) / name)

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
