"""The folder that a trial's files are copied into: nothing in it looks complete before all of it is there.

What arrives lies in a folder of its own, each file by its content's hash, until all have arrived and were checked: in
`TARGET.loraq-pull`, or `TARGET/.loraq-pull` where the target exists. A copy that broke off goes on there.
`.loraq-pull.json` in the target says which trial's files they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jobqueue.errors import LoraqError, MachineError, StorageError, TargetError
from jobqueue.location import Stretch
from jobqueue.processes import locked
from jobqueue.published import Source, is_plain
from jobqueue.storage import file_hash
from jobqueue.transfer import PIECE_BYTES

RECEIPT = ".loraq-pull.json"
PARTS = ".loraq-pull"
READY = "ready"  # below the parts: what becomes the target
COMES_LAST = ("adapter_config.json", "config.json")  # without it no library takes the folder for a model
Progress = Callable[[int, int, str], None]
"""Called with the bytes that are there, all of them, and why nothing comes ("" where something does)."""


@dataclass(frozen=True)
class File:
    """One to be copied."""

    name: str  # below the target, with /
    source: str  # in the storage
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Target:
    """A folder, and what is to be in it.

    Args:
        folder: absolute; it need not exist.
        title: what the files are, as `demo/2`.
        force: replace what is there.

    Raises TargetError where it holds something else, and is not forced; MachineError where it cannot be written.
    """

    folder: Path
    title: str
    files: tuple[File, ...]
    force: bool = False

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def lacking(self) -> list[File]:
        """What is not there."""
        with self._errors():
            if self.folder.exists() and not self.folder.is_dir():
                raise TargetError(f"{self.folder} is no folder", "Name another TARGET.")
            found = {file: self._state(file) for file in self.files}
            others = self._others()
        same = [file.name for file, state in found.items() if state == "same"]
        different = [file.name for file, state in found.items() if state == "other"]
        trials = {trial for name, trial in others.items() if name not in same}
        if (different or trials) and not self.force:
            held = f"holds {_few(sorted(trials))}" if trials else f"has another {_few(different)}"
            do = f"Name another TARGET for {self.title}, or replace what is there with --force."
            raise TargetError(f"{self.folder} {held}", do)
        return [file for file, state in found.items() if state != "same"]

    def to_come(self, lacking: Sequence[File]) -> int:
        """Bytes of these that are not on this disk yet."""
        sizes = {file.sha256: file.bytes for file in lacking}
        return sum(size - _kept(self._parts / sha256, size) for sha256, size in sizes.items())

    def fill(self, lacking: Sequence[File], source: Source, progress: Progress) -> int:
        """Copies what is lacking; how many bytes that were. Raises StorageError, ServerError, NotFoundError."""
        if not lacking:
            return 0
        with self._errors(), self._alone() as parts:
            lacking = [file for file in lacking if self._state(file) != "same"]  # another one may have been here
            by_content = {file.sha256: file for file in lacking}
            copied = self._fetch(source, list(by_content.values()), parts, progress)
            for sha256, file in by_content.items():
                _check(parts / sha256, file)
            self._put(lacking, parts)
            return copied

    def _fetch(self, source: Source, files: Sequence[File], parts: Path, progress: Progress) -> int:
        kept = {file: _kept(parts / file.sha256, file.bytes) for file in files}
        to_come = sum(file.bytes - kept[file] for file in files)
        wanted = [
            (file, Stretch(file.source, at, min(PIECE_BYTES, file.bytes - at)))
            for file in files
            for at in range(kept[file], file.bytes, PIECE_BYTES)
        ]
        arrived = self.bytes - to_come

        def tell(why: str = "") -> None:
            progress(arrived, self.bytes, why)

        tell()
        with closing(source.read_parts([stretch for _, stretch in wanted], tell)) as contents:
            for (file, stretch), content in zip(wanted, contents, strict=True):
                if len(content) != stretch.size:
                    raise _damaged(file)
                _write(parts / file.sha256, stretch.start, content)
                arrived += stretch.size
                tell()
        return to_come

    def _put(self, files: Sequence[File], parts: Path) -> None:
        """All of them into the folder, which begins to exist with them if it did not."""
        ready = parts / READY
        root = self.folder if self.folder.exists() else ready
        own = {file.name: {"trial": self.title, "source": file.source, "sha256": file.sha256} for file in self.files}
        replaced = {*self._others()} - {*own} | {file.name for file in files}
        for name in replaced:
            self._path(name).unlink(missing_ok=True)
        kept = {name: entry for name, entry in self._receipt().items() if name not in replaced}
        left = [file.sha256 for file in files]
        for file in sorted(files, key=lambda file: file.name.rpartition("/")[2] in COMES_LAST):
            path = root / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            left.remove(file.sha256)
            if file.sha256 in left:  # another one has the same content
                shutil.copyfile(parts / file.sha256, path)
            else:
                os.replace(parts / file.sha256, path)
        (parts / RECEIPT).write_text(json.dumps(kept | own, indent=1), encoding="utf-8")
        os.replace(parts / RECEIPT, root / RECEIPT)
        if root == ready:
            ready.rename(self.folder)

    # -- what is there

    def _state(self, file: File) -> str:
        """same, other or none"""
        path = self._path(file.name)
        if not os.path.lexists(path):
            return "none"
        return "same" if path.stat(follow_symlinks=False).st_size == file.bytes and _has(path, file.sha256) else "other"

    def _path(self, name: str) -> Path:
        """Of a file in the folder; raises TargetError where a link leads out of it."""
        path = self.folder / name
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise TargetError(f"{path.parent} leads out of {self.folder}", "Name another TARGET.")
        return path

    def _receipt(self) -> dict[str, dict[str, str]]:
        """What was copied here before: trial, source and sha256 of each file."""
        try:
            found = json.loads((self.folder / RECEIPT).read_text(encoding="utf-8"))
            keys = ("trial", "source", "sha256")
            return {name: {key: str(entry[key]) for key in keys} for name, entry in found.items() if is_plain(name)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # there is none, or somebody wrote into it
            return {}

    def _others(self) -> dict[str, str]:
        """Files of other trials that are as they were copied here: name -> trial."""
        others = {name: entry for name, entry in self._receipt().items() if entry["trial"] != self.title}
        return {name: entry["trial"] for name, entry in others.items() if _has(self._path(name), entry["sha256"])}

    # -- what has arrived

    @property
    def _parts(self) -> Path:
        return self.folder / PARTS if self.folder.exists() else self.folder.with_name(f"{self.folder.name}{PARTS}")

    @contextmanager
    def _alone(self) -> Iterator[Path]:
        """The folder for what arrives, for this process alone; what has arrived stays there where the block fails."""
        parts = self._parts
        parts.mkdir(parents=True, exist_ok=True)
        handle = os.open(parts, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if not _taken(handle) or not os.path.samestat(os.fstat(handle), os.stat(parts)):
                raise LoraqError(f"another `loraq pull` fills {self.folder}", "Wait for it, or name another TARGET.")
            try:
                shutil.rmtree(parts / READY, ignore_errors=True)
                yield parts
                shutil.rmtree(parts, ignore_errors=True)
            finally:
                with suppress(OSError):
                    parts.rmdir()  # nothing has arrived
        finally:
            os.close(handle)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(
                f"cannot write {error.filename or self.folder}: {error.strerror or error}",
                "Make room, or name another TARGET; what has arrived is kept.",
            ) from error


def check_room(targets: Sequence[Target], lacking: Sequence[Sequence[File]]) -> None:
    """Raises MachineError where what each of them lacks does not fit on the disk, all of it together."""
    to_come: dict[int, int] = {}
    for target, files in zip(targets, lacking, strict=True):
        there = next(parent for parent in (target.folder, *target.folder.parents) if parent.exists())
        device = there.stat().st_dev
        to_come[device] = to_come.get(device, 0) + target.to_come(files)
        if to_come[device] > (free := shutil.disk_usage(there).free):
            raise MachineError(
                f"{to_come[device]:,} bytes are to come, and {free:,} are free for {target.folder}",
                "Make room, or name a TARGET on another disk.",
            )


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and not path.is_symlink() and file_hash(path) == sha256


def _kept(part: Path, size: int) -> int:
    """How many bytes of a file that is arriving can be kept: whole pieces, or all of it."""
    try:
        there = part.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
    return there if there == size else there - there % PIECE_BYTES if there < size else 0


def _write(part: Path, at: int, content: bytes) -> None:
    """The file then ends with it; it is never written through a link."""
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb") as there:
        there.truncate(at)
        there.seek(at)
        there.write(content)


def _check(part: Path, file: File) -> None:
    """Raises StorageError where it is not what was published; else it is on the disk."""
    if not file.bytes:
        _write(part, 0, b"")
    if file_hash(part) != file.sha256:
        part.unlink()
        raise _damaged(file)
    with part.open("rb") as there:
        os.fsync(there.fileno())


def _damaged(file: File) -> StorageError:
    return StorageError(
        f"{file.source} is not what its manifest says", "Pull again; if it stays so, the storage has lost a part of it."
    )


def _taken(handle: int) -> bool:
    try:
        return locked(handle, 0)
    except OSError:  # a file system without locks
        return True


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
