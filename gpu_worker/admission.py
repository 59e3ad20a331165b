"""How much of a device's memory is promised to whom: the sum of the promises never exceeds what is usable."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

SLACK = 1.15  # over the estimate, where there is room


class Admission:
    """The memory of one device, shared by its slots.

    Args:
        slots: how many jobs share it.
        kept_bytes: what is for spare trainers, as long as no job needs it.
    """

    def __init__(self, slots: int, kept_bytes: int = 0) -> None:
        self._slots, self._kept_bytes = slots, kept_bytes
        self._promised: dict[str, int] = {}  # job id -> bytes
        self._lock = threading.Lock()
        self._claiming = threading.Lock()

    @contextmanager
    def claiming(self) -> Iterator[None]:
        """One at a time, from the look at the room to the promise: else two jobs would be given the same bytes."""
        with self._claiming:
            yield

    @property
    def promised(self) -> int:
        with self._lock:
            return sum(self._promised.values())

    def room(self, usable_bytes: int) -> int:
        """What is left for one more job."""
        return max(0, usable_bytes - self.promised)

    def admit(self, job_id: str, need_bytes: int, usable_bytes: int) -> int:
        """Promises the job what it needs and somewhat more, or a slot's share if that is larger; the bytes.

        What it turns out not to need it gives back, see `lower`.
        """
        wanted = max(int(need_bytes * SLACK), (usable_bytes - self._kept_bytes) // self._slots)
        granted = max(need_bytes, min(wanted, self.room(usable_bytes)))
        with self._lock:
            self._promised[job_id] = granted
        return granted

    def budget(self, job_id: str) -> int:
        """What the job was promised."""
        with self._lock:
            return self._promised[job_id]

    def lower(self, job_id: str, to_bytes: int) -> None:
        """The job holds itself to less than it was promised."""
        with self._lock:
            self._promised[job_id] = min(to_bytes, self._promised[job_id])

    def release(self, job_id: str) -> None:
        with self._lock:
            self._promised.pop(job_id, None)
