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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobqueue.errors import StorageError
from jobqueue.job import Claim
from jobqueue.location import Location

if TYPE_CHECKING:
    pass

MANIFEST = "manifest.json"
BLOB = "loraq://"  # a source in storage, by content: loraq://<sha256>/<name>


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


class Storage(Location):
    """What loraq keeps at a location: data by content, and what attempts have published."""

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

    def remove(self, folder: str) -> bool:
        """A folder and all in it, the manifest first: from then on it does not count. False where there is none."""
        with self._errors("write"):
            path = f"{self._root}/{folder}"
            if self._fs.exists(f"{path}/{MANIFEST}"):
                self._fs.rm_file(f"{path}/{MANIFEST}")
            found = bool(self._fs.exists(path))
            if found:
                self._fs.rm(path, recursive=True)
            return found

    def _attempts(self, job_id: str, batch: str) -> list[str]:
        """The folders of a job's attempts, the newest first."""
        base = job_folder(job_id, batch)
        # no .nfs0001, no .DS_Store
        names = [name for name in self._names(base) if name.partition("-")[0].isdigit()]
        return [f"{base}/{name}" for name in sorted(names, key=lambda n: int(n.split("-")[0]), reverse=True)]

    def _complete(self, folder: str, submission: str) -> Published | None:
        if not self._fs.exists(f"{self._root}/{folder}/{MANIFEST}"):
            return None
        manifest = json.loads(self.read_text(f"{folder}/{MANIFEST}"))
        return Published(folder, manifest) if not submission or manifest.get("submission") == submission else None

    def fetch_source(self, source: str, into: Path) -> str:
        """A spec's data source as this machine can read it; what was submitted is copied below `into`."""
        if not source.startswith(BLOB):
            return source
        sha256, _, name = source.removeprefix(BLOB).partition("/")
        return str(self.fetch(f"blobs/{sha256}", into) / name)
