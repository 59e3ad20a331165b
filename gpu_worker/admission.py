"""How much of a device's memory is promised to whom: the sum of the promises never exceeds what is usable."""

from __future__ import annotations

import threading

SLACK = 1.15  # over the estimate, where there is room
MORE = 1.5  # times what a job was given, after it ran out of it
WHOLE = 0.98  # of a device is all of it: what is usable varies a little from one look to the next


def grown(given_bytes: int, usable_bytes: int) -> int | None:
    """What a job needs that ran out of what it was given; None: it had the largest device to itself."""
    most = int(WHOLE * usable_bytes)
    return min(int(MORE * given_bytes), most) if given_bytes < most else None


class Admission:
    """The memory of one device, shared by its slots; it knows a job by the nonce of its claim.

    A job whose lease was lost may be claimed again, by another slot, before its earlier attempt has ended here.

    Args:
        slots: how many jobs share it.
        kept_bytes: what is for spare trainers, as long as no job needs it.
    """

    def __init__(self, slots: int, kept_bytes: int = 0) -> None:
        self._slots, self._kept_bytes = slots, kept_bytes
        self._promised: dict[str, int] = {}  # nonce -> bytes
        self._lock = threading.Lock()
        # Held from the look at the room to the promise: else two jobs would be given the same bytes.
        self.claiming = threading.Lock()

    @property
    def promised(self) -> int:
        with self._lock:
            return sum(self._promised.values())

    @property
    def jobs(self) -> int:
        """How many were promised something."""
        with self._lock:
            return len(self._promised)

    def room(self, usable_bytes: int) -> int:
        """What is left for one more job."""
        return max(0, usable_bytes - self.promised)

    def admit(self, nonce: str, need_bytes: int, usable_bytes: int) -> int:
        """Promises the job what it needs and somewhat more, or a slot's share if that is larger; the bytes.

        What it turns out not to need it gives back, see `lower`.
        """
        wanted = max(int(need_bytes * SLACK), (usable_bytes - self._kept_bytes) // self._slots)
        granted = max(need_bytes, min(wanted, self.room(usable_bytes)))
        with self._lock:
            self._promised[nonce] = granted
        return granted

    def budget(self, nonce: str) -> int:
        """What the job was promised."""
        with self._lock:
            return self._promised[nonce]

    def lower(self, nonce: str, to_bytes: int) -> None:
        """The job holds itself to less than it was promised."""
        with self._lock:
            self._promised[nonce] = min(to_bytes, self._promised[nonce])

    def release(self, nonce: str) -> None:
        with self._lock:
            self._promised.pop(nonce, None)
