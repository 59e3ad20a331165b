"""`loraq pull`: which files of the storage are a trial's, and their names in the folder they are copied into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jobqueue.asking import TRIAL
from jobqueue.errors import NotFoundError
from jobqueue.evaluations import base_for, is_base
from jobqueue.exports import batch_of_exports
from jobqueue.job import Job, JobKind, JobState
from jobqueue.published import Source, listed
from jobqueue.results import BatchReport
from jobqueue.target import File, Target, check_room

Part = Literal["adapter", "log", "scores", "export"]
PARTS: tuple[Part, ...] = get_args(Part)
LOG = "log.txt"


@dataclass(frozen=True)
class Pull:
    """What is to be copied, where to, and where from."""

    target: Target
    source: Source


@dataclass(frozen=True)
class Pulled:
    """A trial's files on this machine."""

    trial: str
    target: Path
    files: tuple[File, ...]
    bytes: int
    copied_bytes: int  # by this pull; the others were there


def pull(pulls: Sequence[Pull], progress: Callable[[str, int, int, str], None]) -> list[Pulled]:
    """Copies all of it, one after the other; nothing where there is no room for all, or something else is in the way.

    Raises TargetError, MachineError, StorageError, ServerError, NotFoundError; called again it goes on.
    """
    lacking = [each.target.lacking() for each in pulls]
    check_room([each.target for each in pulls], lacking)
    done = []
    for each, files in zip(pulls, lacking, strict=True):
        target = each.target

        def tell(there: int, size: int, why: str, title: str = target.title) -> None:
            progress(title, there, size, why)

        copied = target.fill(files, each.source, tell)
        done.append(Pulled(target.title, target.folder, target.files, target.bytes, copied))
    return done


def trials_of(jobs: Sequence[Job]) -> list[str]:
    """The trials of a batch, and its merged adapters, as BATCH/NAME in the order of the file."""
    own = [job for job in jobs if job.kind in (JobKind.TRAIN, JobKind.EVALUATE, JobKind.EXPORT) and job.batch]
    return list(dict.fromkeys(job.of_trial for job in own))


def best_of(report: BatchReport, jobs: Sequence[Job]) -> tuple[str, list[str]]:
    """The best trial that has an adapter, and the labels of better ones that have none: votes, say.

    Raises NotFoundError where there is none, or nothing tells which one it is.
    """
    ready = {job.id: job.of_trial for job in jobs if job.has_adapter and job.state is JobState.SUCCEEDED}
    better: list[str] = []
    for trial in report.trials:
        measured = trial.scores or trial.measures or trial.validation_loss is not None
        if trial.job in ready and (measured or len(ready) == 1):
            return ready[trial.job], better
        if measured:
            better.append(trial.label or trial.job)
    what = "no trial has been evaluated" if ready else "no trial has an adapter"
    raise NotFoundError(f"{report.batch}: {what}", f"See `loraq results {report.batch}`.")


class Chooser:
    """Finds the files of a trial.

    Args:
        source: has them.
        jobs_of: the jobs of a batch.
        batch_names: of all batches.
    """

    def __init__(
        self, source: Source, jobs_of: Callable[[str], list[Job]], batch_names: Callable[[], list[str]]
    ) -> None:
        self._source, self._jobs_of, self._batch_names = source, jobs_of, batch_names

    def target(self, trial: str, folder: Path | None, what: Sequence[Part], *, force: bool) -> Target:
        """The folder that is to have some `what` of a trial, BATCH/NUMBER or BATCH/NAME of merged adapters.

        Without a `folder` it is BATCH-NUMBER in the working directory. Without `what` it is the adapter, or the export
        where there is nothing else; PARTS are all that there is.

        Raises NotFoundError where there is no such trial, or it has not made that; StorageError.
        """
        named = TRIAL.fullmatch(trial)
        if named is None:
            raise NotFoundError(
                f"{trial!r} is no trial", "A trial is BATCH/NUMBER: `loraq ls BATCH` shows the numbers."
            )
        (batch, name), own = named.groups(), ".".join(named.groups())
        every = self._jobs_of(batch)
        jobs = [job for job in every if job.id == own or job.id.startswith(f"{own}.")]
        if not jobs:
            raise NotFoundError(f"{batch} has no trial {name}", f"See `loraq ls {batch}`.")
        if not what:
            what = ["export"] if all(job.kind is JobKind.EXPORT for job in jobs) else ["adapter"]
        if "export" in what:
            jobs += self._exports(batch, own)
        if "scores" in what:
            jobs += _bases(jobs, every)
        done = [job for job in jobs if job.state is JobState.SUCCEEDED and job.outcome.get("folder")]
        found = self._files(done, what)
        title = f"{batch}/{name}"
        missing = [part for part in what if part not in found]
        if missing and (not found or {*what} != {*PARTS}):
            raise _has_no(missing[0], title, jobs)
        files = {file.name: file for part in found for file in found[part].values()}
        return Target((folder or Path(f"{batch}-{name}")).resolve(), title, tuple(files.values()), force)

    def _exports(self, batch: str, trained_by: str) -> list[Job]:
        """What `loraq export` has made of it."""
        found = []
        for name in self._batch_names():
            if name.startswith(batch_of_exports(batch)) and name != batch:
                with suppress(NotFoundError):  # removed since
                    found += [job for job in self._jobs_of(name) if job.kind is JobKind.EXPORT]
        return [job for job in found if job.spec["adapter_job"] == trained_by]

    def _files(self, jobs: Sequence[Job], what: Sequence[Part]) -> dict[Part, dict[str, File]]:
        """By the name in the folder. Where several exports have the same, those of the newest."""
        found: dict[Part, dict[str, File]] = {}
        for job in sorted(jobs, key=lambda job: job.ended_at, reverse=True):
            if {*what} & {*_leaves(job)}:
                for part, files in self._of_job(job).items():
                    if part in what and not files.keys() & found.get(part, {}).keys():
                        found.setdefault(part, {}).update(files)
        return found

    def _of_job(self, job: Job) -> dict[Part, dict[str, File]]:
        folder, found = str(job.outcome["folder"]), dict[Part, dict[str, File]]()
        try:
            manifest = listed(self._source, folder)
        except NotFoundError:
            do = f"They were removed; `loraq show {job.id}` says where they lay."
            raise NotFoundError(f"what {job.id} has made is no longer in the storage", do) from None
        for name, entry in manifest.items():
            part, placed = _place(job, name)
            found.setdefault(part, {})[placed] = File(placed, f"{folder}/{name}", entry.sha256, entry.bytes)
        return found


def _leaves(job: Job) -> Iterator[Part]:
    yield "log"
    if job.has_adapter:
        yield "adapter"
    if job.kind is not JobKind.TRAIN:
        yield "export" if job.kind is JobKind.EXPORT else "scores"


def _place(job: Job, name: str) -> tuple[Part, str]:
    """What a file of a job is a part of, and its name in the folder: an adapter lies there as PEFT looks for it."""
    if name == LOG:
        return "log", f"logs/{job.id}.txt"
    if name.startswith("adapter/"):
        return "adapter", name.removeprefix("adapter/")
    if job.kind is JobKind.EVALUATE:
        return "scores", f"scores/{job.id}/{name}"
    return ("export", name) if job.kind is JobKind.EXPORT else ("log", f"logs/{name}")  # of experiment trackers


def _bases(jobs: Sequence[Job], every: Sequence[Job]) -> list[Job]:
    """The evaluations of base models that those of the trial are compared with."""
    bases = [job for job in every if is_base(job)]
    wanted = [base_for(job, bases) for job in jobs if job.kind is JobKind.EVALUATE]
    others: Mapping[str, Job] = {base.id: base for base in wanted if base is not None}
    return [base for base in others.values() if base not in jobs]


def _has_no(part: Part, title: str, jobs: Sequence[Job]) -> NotFoundError:
    under_way = [job for job in jobs if part in _leaves(job) and job.state is not JobState.SUCCEEDED]
    if under_way:
        job = under_way[0]
        do = f"`loraq show {job.id}` says why." if job.state.final else f"`loraq watch {job.batch}` follows it."
        return NotFoundError(f"{title} has no {part}: {job.id} is {job.state}", do)
    makes = part == "export" and any(job.has_adapter for job in jobs)
    do = f"`loraq export {title}` makes one." if makes else "--what names other parts of a trial."
    return NotFoundError(f"{title} has no {part}", do)
