"""A running job's checkpoints in the storage: kept, counted, found again by the next attempt on any host."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

from gpu_worker.protocol import Checkpoint
from jobqueue.errors import StorageError
from jobqueue.job import Claim
from jobqueue.storage import Published, Storage, attempt_folder

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Copies what the trainer announces into the storage, beside the training, the manifest last.

    In a daemon thread of its own: a storage that hangs must not keep the worker from ending.
    """

    def __init__(self, storage: Storage, claim: Claim, keep: int) -> None:
        self._storage, self._claim, self._keep = storage, claim, keep
        self._waiting: SimpleQueue[Checkpoint | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"checkpoints-{claim.job_id}", daemon=True)
        self._closed = False
        self.kept = 0  # checkpoints that this attempt has completed
        self.said: SimpleQueue[str] = SimpleQueue()  # for the job's log

    def newest(self, scratch: Path) -> str | None:
        """The newest complete checkpoint of any attempt, as a folder that this machine can read."""
        newest = next(self._intact(), None)
        if newest is None:
            return None
        return str(self._storage.fetch(newest.folder, scratch / newest.folder.rpartition("/")[2]))

    def _intact(self) -> Iterator[Published]:
        """Those of all attempts from which training can go on, the newest first."""
        found = self._storage.checkpoints(self._claim.job_id, self._claim.batch, self._claim.submission)
        return filter(self._storage.intact, found)

    def take(self, checkpoint: Checkpoint) -> None:
        """Returns at once. A checkpoint that cannot be kept is said and forgotten: the training is worth more."""
        try:
            if not self._thread.ident:
                self._thread.start()
        except RuntimeError as error:  # the machine has no thread left; it may for the next one
            self._forgo(checkpoint, error)
        else:
            self._waiting.put(checkpoint)

    def _run(self) -> None:
        while not self._closed and (checkpoint := self._waiting.get()) is not None:
            self._copy(checkpoint)

    def _copy(self, checkpoint: Checkpoint) -> None:
        local = Path(checkpoint.folder)
        manifest = {"job": self._claim.job_id, "submission": self._claim.submission, "step": checkpoint.step}
        try:
            self._storage.publish(local, f"{attempt_folder(self._claim)}/checkpoints/{local.name}", manifest)
            self.kept += 1
            if self._closed:  # the next attempt may be reading what there is
                return
            for published in list(self._intact())[self._keep :]:
                self._storage.remove(published.folder)
        except (StorageError, OSError) as error:
            self._forgo(checkpoint, error)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _forgo(self, checkpoint: Checkpoint, error: Exception) -> None:
        log.warning("%s: no checkpoint at step %d: %s", self._claim.job_id, checkpoint.step, error)
        self.said.put(f"loraq: the checkpoint of step {checkpoint.step} could not be kept: {error}")
        shutil.rmtree(checkpoint.folder, ignore_errors=True)

    def forget(self) -> None:
        """The job needs none any more."""
        for published in self._storage.checkpoints(self._claim.job_id, self._claim.batch, self._claim.submission):
            self._storage.remove(published.folder)

    def finish(self) -> None:
        """Waits for the copies that are under way."""
        self._waiting.put(None)
        if self._thread.ident:
            self._thread.join()

    def give_up(self) -> None:
        """Nothing more is copied, but for what is under way."""
        self._closed = True
