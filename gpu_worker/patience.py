"""Work on the storage, with an end: a mount that hangs holds whoever touches it, for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from gpu_worker.lease import Lease
from jobqueue.errors import StaleAttemptError, StorageError
from jobqueue.settings import Settings

LOOK_S = 0.2
Answer = TypeVar("Answer")


class DrainedError(Exception):
    """The worker was told to stop before there was anything to save."""


class Patience:
    """Does what an attempt asks of the storage in a thread that can be given up, while the lease is renewed.

    Args:
        stopping: whether the worker has to stop, soon.
        drained: whether to give up at once, as a worker that has to stop need not wait for it.
    """

    def __init__(
        self,
        lease: Lease,
        settings: Settings,
        stopping: Callable[[], bool],
        drained: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stopping, self._drained = stopping, drained
        self._lease, self._timeout_s, self._grace_s = lease, settings.storage_timeout_s, settings.grace_s

    def __call__(self, what: str, work: Callable[[], Answer], *, settled: bool = False, graces: float = 1) -> Answer:
        """What `work` returns or raises.

        A thread that was given up may go on where the storage wakes up: it writes below its own attempt's folder only.
        Of a worker that has to stop it gets so many times the grace time.

        Raises:
            StorageError: it took longer than the settings allow, or than the grace time after a cancel or a stop.
            StaleAttemptError: the lease was lost meanwhile, unless the attempt is `settled` already.
            DrainedError: as `drained` says.
        """
        done: Future[Answer] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        try:
            threading.Thread(target=run, name=f"storage: {what}", daemon=True).start()
        except RuntimeError as error:  # no fault of the job's
            raise StorageError(f"could not {what}: {error}", "See the limits on processes (ulimit -u).") from None
        give_up_at, hurries = time.monotonic() + self._timeout_s, False
        while not wait([done], LOOK_S).done:
            if self._lease.lost.is_set() and not settled:
                raise StaleAttemptError(f"the lease was lost while the worker had to {what}")
            if self._drained():
                raise DrainedError
            if not hurries and (self._lease.cancelled.is_set() or self._stopping()):
                hurries, give_up_at = True, min(give_up_at, time.monotonic() + graces * self._grace_s)
            if time.monotonic() >= give_up_at:
                raise StorageError(
                    f"could not {what}: the storage hangs",
                    "Check the mount or the network to it; LORAQ_STORAGE_TIMEOUT_S says how long a worker waits.",
                )
        return done.result()
