"""What an attempt says: to a file, whole, and to the job's stream in the store, in bundles, while the store listens."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from gpu_worker.protocol import Answer, Progress
from jobqueue.errors import ServerError, StaleAttemptError
from jobqueue.job import Claim
from jobqueue.store import Store

FLUSH_S = 0.5
RETRY_S = 5.0  # after the store did not answer
MAX_BUNDLE = 500
LAST_LINES = 10  # of an attempt that fails, kept in the job's record
MAX_BACKLOG = 20_000  # entries that wait for the store; beyond that the oldest are only in the file

log = logging.getLogger(__name__)


class Journal:
    """Log lines, progress and answers of one attempt."""

    def __init__(self, store: Store, claim: Claim, file: Path) -> None:
        self._store, self._claim = store, claim
        self._file = file.open("a", encoding="utf-8")
        self._backlog: deque[tuple[str, str]] = deque(maxlen=MAX_BACKLOG)
        self._next_flush = 0.0
        self._sent = 0  # entries that the store has
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush(at_once=True)
        self._file.close()

    @property
    def silent(self) -> bool:
        """Whether the attempt has said nothing."""
        return not self._sent and not self._backlog

    def line(self, text: str) -> None:
        self.last_lines.append(text)
        self._file.write(text + "\n")
        self._backlog.append(("log", text))

    def event(self, event: Progress | Answer) -> None:
        fields = {key: value for key, value in asdict(event).items() if value is not None and key != "type"}
        self._backlog.append((event.type, json.dumps(fields)))

    def flush(self, *, at_once: bool = False) -> None:
        """Sends what has gathered, twice a second at most. A store that is away is tried again later."""
        self._file.flush()
        if not at_once and time.monotonic() < self._next_flush:
            return
        self._next_flush = time.monotonic() + FLUSH_S
        while self._backlog:
            bundle = [self._backlog[i] for i in range(min(MAX_BUNDLE, len(self._backlog)))]
            try:
                self._store.append(self._claim, bundle, self._sent)
            except ServerError as error:
                log.warning("%s: log kept back: %s", self._claim.job_id, error.what)
                self._next_flush = time.monotonic() + RETRY_S
                return
            except StaleAttemptError:
                self._backlog.clear()  # the lease thread has noticed, or will
                return
            self._sent += len(bundle)
            for _ in bundle:
                self._backlog.popleft()
