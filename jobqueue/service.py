"""What a user can do: the client that the command line, and any program, calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobqueue import names, steering
from jobqueue.broker import make_app, send_tokens
from jobqueue.errors import BusyError, StorageError
from jobqueue.memory import all_classes
from jobqueue.view import View

if TYPE_CHECKING:
    from celery import Celery

    from jobqueue.cards import Deck
    from jobqueue.export_spec import ExportOptions
    from jobqueue.job import Batch, Job, WorkerInfo
    from jobqueue.plan import Plan
    from jobqueue.preview import Preview
    from jobqueue.pull import Part, Pull, Pulled
    from jobqueue.ratings import Ratings
    from jobqueue.sweep import Sweep

UploadProgress = Callable[[Path, int, int], None]
"""Called with a file, how many bytes of it have arrived, and how many it has."""
PullProgress = Callable[[str, int, int, str], None]
"""Called with a trial, how many of its bytes are here, how many it has, and why none come ("" while some do)."""

PREVIEW_S = 60.0  # until a worker begins, and until it ends


class Client(View):
    """All that the command line does: looks, and submits, steers, asks, copies."""

    @cached_property
    def _app(self) -> Celery:
        return make_app(self.store.url, self.settings.timeout_s)

    # -- submitting

    def read(self, file: Path, sets: Sequence[str] = ()) -> Sweep:
        """A sweep file, checked. Raises SpecError with every problem at once."""
        from jobqueue.sweep import read_sweep

        return read_sweep(file, sets)

    def plan(self, sweep: Sweep) -> Plan:
        """The jobs of a sweep; needs no server. Raises SpecError, DataError."""
        from jobqueue.plan import make_plan

        return make_plan(sweep, workers_are_here=self.settings.redis_url is None)

    def plan_export(self, trial: str, options: ExportOptions) -> Plan:
        """One job that exports a trial (BATCH/NUMBER). Raises NotFoundError where it has trained nothing."""
        from jobqueue import exports

        return exports.plan_export(trial, options, self.job)

    def find(self, plan: Plan) -> Batch | None:
        """The batch of this owner that was made from the same plan."""
        name = self.store.submitted(self._key(plan))
        return self.store.batch(name) if name else None

    def submit(
        self, plan: Plan, *, force: bool = False, again: bool = False, progress: UploadProgress | None = None
    ) -> Batch:
        """All of it or nothing: checks, uploads the local files, writes every job in one call, wakes the workers.

        The same plan submitted twice (after an answer that was lost, say) is one batch. Returns when the server has it
        on its disk, as far as it keeps jobs there: see `warnings`.

        Args:
            plan: what `plan` returned.
            force: submit although no living worker could hold the largest job.
            again: make another batch of a plan that was submitted before.
            progress: told how far files are that go through the server.

        Raises:
            CapacityError: unless forced.
            SpecError: the trial of `from_adapter` is not there, has no adapter, or one that does not fit.
            StorageError: a file could not be uploaded; nothing was submitted.
            ServerError: the server drops jobs at its memory limit, and nothing was submitted; or it did not answer, or
                did not confirm in time that what it accepted is on its disk.
        """
        from jobqueue import adapters, submission

        submission.check_keeping(self.store)
        plan = submission.corrected(plan, self.store)
        if not force:
            submission.check_capacities(plan, self.workers())
        key = "" if again else self._key(plan)
        plan = adapters.in_storage(plan, self._lookup.job)
        self._upload(plan.files, progress or (lambda file, arrived, size: None))
        with submission.sent_in_doubt(key):
            made = submission.written(plan, key, self.settings.owner, self.store, self.storage)
            send_tokens(self._app, made.classes)
            batch = self.store.batch(made.batch)
        submission.check_on_disk(made, key, self.store)
        return batch

    def _upload(self, files: Mapping[str, Path], progress: UploadProgress) -> None:
        """To the storage, or, where this machine does not know it, through the server to a control worker."""
        from jobqueue.transfer import Sender

        for source, path in files.items():
            if self.storage_is_known:
                self.storage.put_blob(path, source)
            else:
                Sender(self.store, path, source, partial(progress, path)).send()

    def _key(self, plan: Plan) -> str:
        return f"{self.settings.owner}:{plan.key}"

    def ask(self, trial: str, prompts: Sequence[str], **options: Any) -> Job:
        """A job that answers prompts as a trial's base model and adapter do; its `outcome` will have the answers.

        It is of no batch, leaves nothing in the storage, and is forgotten a day after its end.

        Args:
            trial: BATCH/NUMBER.
            options: fields of `AskSpec`: asked, system_prompt, max_new_tokens, temperature, seed.

        Raises NotFoundError, DataError, CapacityError, LoraqError as `asking.question`.
        """
        from jobqueue import asking

        job = asking.question(self.store, trial, prompts, self.settings.owner, options)
        send_tokens(self._app, self.store.ask(job))
        return self.job(job.id)

    def preview(
        self,
        sweep: Sweep,
        row: int | None = None,
        *,
        data_alone: bool = False,
        tokens: bool = True,
        timeout_s: float = PREVIEW_S,
        progress: UploadProgress | None = None,
    ) -> Preview:
        """What a training would read, made by a control worker; `jobqueue.preview.preview` makes it here.

        Raises SpecError, DataError; CapacityError where no worker is alive, or none has begun within `timeout_s` or
        ended within as much again; LoraqError where it has not succeeded.
        """
        from jobqueue import previewing

        previewing.check_alive(self.store)
        here = self.settings.redis_url is None
        job, files = previewing.job_of(
            sweep, row, self.settings.owner, data_alone=data_alone, tokens=tokens, workers_are_here=here
        )
        self._upload(files, progress or (lambda file, arrived, size: None))
        send_tokens(self._app, self.store.ask(job))
        try:
            return previewing.preview_of(previewing.ended(self.store, job.id, timeout_s), sweep)
        except BaseException:  # whoever does not wait for it any more needs it no more
            self.cancel(job.id)
            raise

    # -- files

    def plan_pull(
        self, trial: str, target: Path | None = None, *, what: Sequence[Part] = (), force: bool = False
    ) -> Pull:
        """What `pull` is to copy of a trial; nothing is written.

        Args:
            trial: BATCH/NUMBER, or BATCH/NAME of merged adapters.
            target: the folder that is to have it; None: BATCH-NUMBER in the working directory.
            what: adapter, log, scores, export; none: the adapter, PARTS: all that there is.
            force: replace what is there.

        Raises NotFoundError where there is no such trial, or it has not made that; StorageError.
        """
        from jobqueue.pull import Chooser, Pull

        source = self._source()
        if source is None:
            raise StorageError(
                "this machine does not know the workers' storage, and no control worker is alive to read it",
                "Set LORAQ_STORAGE, as they have it, or start `loraq worker` on a host that has it.",
            )
        chooser = Chooser(source, self.jobs, self.store.batch_names)
        return Pull(chooser.target(trial, target, what, force=force), source)

    def pull(self, *pulls: Pull, progress: PullProgress | None = None) -> list[Pulled]:
        """Copies trials' files to this machine: from the storage, or through the server where that is out of reach.

        Nothing in the target looks complete before all is there and was checked. Files that are there are not copied
        again; what broke off goes on when it is called again.

        Raises:
            TargetError: something else is in the target, and nothing was copied.
            MachineError: there is no room for all of it, and nothing was copied; or it cannot be written.
            StorageError: the storage cannot be read, has not what was published, or no control worker answers.
        """
        from jobqueue import pull

        return pull.pull(pulls, progress or (lambda trial, there, size, why: None))

    # -- score cards

    def export_cards(self, batch: str, questions: int, seed: int) -> Deck:
        """Answers of the batch's models to the same few questions, for people to rate blind.

        Raises DataError where there are none, BusyError where the batch has not ended.
        """
        from jobqueue import cards

        return cards.export(self.report(batch), self.jobs(batch), self._known_storage(), questions, seed)

    def import_cards(self, batch: str, files: Sequence[Path]) -> Ratings:
        """What at least three reviewers made of a batch's answers; kept with the batch.

        Raises DataError with all that is wrong with the sheets, MachineError without the packages of `loraq[cards]`.
        """
        from jobqueue import cards, sheets

        return cards.read_filled(batch, sheets.contents(files), self._known_storage())

    # -- steering

    def cancel(self, target: str) -> list[Job]:
        """Stops a job or a batch; the jobs that were stopped, or asked to stop and will within seconds.

        An evaluation of a base model goes on while another batch waits for it.
        """
        return self._woken(steering.cancel(self.store, target))

    def hold(self, target: str) -> list[Job]:
        """Keeps a job, a batch's jobs, or a whole memory class from being claimed until it is released.

        Running jobs go on. Returns the jobs that this changed; none for a class.
        """
        if target in all_classes():
            self.store.mark("held_classes", target, True)
            return []
        return self.store.jobs(self.store.hold([job.id for job in steering.own(self.store, target)]))

    def release(self, target: str) -> list[Job]:
        """Ends a hold; as `hold`."""
        if target in all_classes():
            self.store.mark("held_classes", target, False)
            return self._woken(([], [target]))
        return self._woken(self.store.release([job.id for job in steering.own(self.store, target)]))

    def retry(self, target: str, *, failed_only: bool = False) -> list[Job]:
        """Runs again what failed or was cancelled: of a batch, or one job with what it needs and what waited for it.

        With `failed_only`, what somebody cancelled stays so, unless a failed job needs it.
        Training goes on from the newest checkpoint. The batch's report is made anew. Returns the jobs that begin.
        """
        return self._woken(steering.retry(self.store, target, failed_only=failed_only))

    def _woken(self, changed: steering.Changed) -> list[Job]:
        """The jobs that were changed, once the workers know of them."""
        job_ids, classes = changed
        send_tokens(self._app, classes)
        return self.store.jobs(job_ids)

    def remove(self, name: str, *, files: bool = False) -> bool:
        """Forgets an ended batch, archived or not; with `files`, its adapters, logs and scores in the storage too.

        Returns whether there were such files. Raises NotFoundError, BusyError where a job has not ended, and
        StorageError where this machine does not know the storage with the files.
        """
        storage = self._known_storage() if files else None
        with names.told(names.no_batch, name, self.store):
            has_ended = self.store.remove(name)
        if not has_ended:
            raise BusyError(f"{name} has not ended", f"Wait for it, or stop it first: loraq cancel {name}")
        return storage is not None and storage.remove(f"batches/{name}")

    def drain(self, target: str, *, undo: bool = False) -> list[WorkerInfo]:
        """A worker, or all of a host, takes no more jobs; running ones are saved and go back into the queue.

        Returns the workers that are meant. Raises NotFoundError where none has that name, and LoraqError where several
        machines have it, or a worker is to take jobs whose whole host is drained.
        """
        return steering.drain(self.store, target, undo=undo)

    def forget_server(self) -> None:
        """The server is about to be stopped in good order: trust its next start at once."""
        self.store.orderly()
