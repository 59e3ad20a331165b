"""A running job's checkpoints in the storage: kept, counted, found again by the next attempt on any host."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_worker.protocol import Checkpoint
from jobqueue.errors import StorageError
from jobqueue.job import Claim
from jobqueue.storage import Storage, attempt_folder

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Copies what the trainer announces into the storage, beside the training, the manifest last."""

    def __init__(self, storage: Storage, claim: Claim, keep: int) -> None:
        self._storage, self._claim, self._keep = storage, claim, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"checkpoints-{claim.job_id}")
        self.kept = 0  # checkpoints that this attempt has completed

    def newest(self, scratch: Path) -> str | None:
        """The newest complete checkpoint of any attempt, as a folder that this machine can read."""
        found = self._storage.checkpoints(self._claim.job_id, self._claim.batch, self._claim.submission)
        if not found:
            return None
        newest = found[0]
        return str(self._storage.fetch(newest.folder, scratch / newest.folder.rpartition("/")[2]))

    def take(self, checkpoint: Checkpoint) -> None:
        """Returns at once. A checkpoint that cannot be kept is said and forgotten: the training is worth more."""
        self._thread.submit(self._copy, checkpoint)

    def _copy(self, checkpoint: Checkpoint) -> None:
        local = Path(checkpoint.folder)
        manifest = {"job": self._claim.job_id, "submission": self._claim.submission, "step": checkpoint.step}
        try:
            self._storage.publish(local, f"{attempt_folder(self._claim)}/checkpoints/{local.name}", manifest)
            self.kept += 1
            old = self._storage.checkpoints(self._claim.job_id, self._claim.batch, self._claim.submission)[self._keep :]
            for published in old:
                self._storage.remove(published.folder)
        except (StorageError, OSError) as error:
            log.warning("%s: no checkpoint at step %d: %s", self._claim.job_id, checkpoint.step, error)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def forget(self) -> None:
        """The job needs none any more."""
        for published in self._storage.checkpoints(self._claim.job_id, self._claim.batch, self._claim.submission):
            self._storage.remove(published.folder)

    def close(self) -> None:
        """Waits for the copy that is under way."""
        self._thread.shutdown(wait=True)
