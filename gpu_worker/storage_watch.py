"""Whether a worker can write: it tries, in the storage and on its own disk, and takes no job while it cannot."""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

from jobqueue.errors import LoraqError
from jobqueue.storage import Storage

log = logging.getLogger(__name__)
TRY_S = 30.0  # how often, while all is well
AGAIN_S = 2.0  # and while it is not
HANGS_S = 20.0  # a trial that takes longer
UNTRIED = "its storage was not tried yet"
CONTENT = "loraq was here\n"


class StorageWatch:
    """Tries from a thread of its own, which a hanging mount may hold."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._storage, self._folder = storage, folder
        self._problem = UNTRIED
        self._began_at = math.inf  # of the trial that goes on
        self._wanted = threading.Event()
        self._tried = threading.Event()
        threading.Thread(target=self._run, name="storage", daemon=True).start()
        self._tried.wait(HANGS_S)

    @property
    def problem(self) -> str:
        """Why it takes no job, "" where it can write."""
        hangs_s = time.monotonic() - self._began_at
        return self._problem if hangs_s < HANGS_S else f"its storage hangs for {hangs_s:.0f} s"

    def try_again(self) -> None:
        """Soon: something has failed."""
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.clear()
            self._began_at = time.monotonic()
            before, self._problem = self._problem, self._try()
            self._began_at = math.inf
            self._tried.set()
            if self._problem and self._problem != before:
                log.warning("%s", self._problem)
            elif before not in (UNTRIED, self._problem):
                log.warning("the storage and this host's disk can be written again")
            self._wanted.wait(AGAIN_S if self._problem else TRY_S)

    def _try(self) -> str:
        try:
            self._storage.try_out()
            file = self._folder / "trial"
            file.write_text(CONTENT)
            file.unlink()
        except LoraqError as error:
            return error.what
        except OSError as error:
            return f"cannot write on this host: {error}"
        return ""
