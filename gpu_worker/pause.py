"""A host whose storage or disk fails rests."""

from __future__ import annotations

import threading
import time

FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 600.0


class Pause:
    """How long nothing is claimed, since the host would spoil the whole queue, one job after the other.

    Longer each time, until an attempt shows that it is well again. (What is full for an adapter may hold a trial.)
    """

    def __init__(self) -> None:
        self._seconds = self._until = 0.0
        self._why, self._lock = "", threading.Lock()

    @property
    def why(self) -> str:
        """Empty where there is none now."""
        return self._why if time.monotonic() < self._until else ""

    def begin(self, why: str) -> float:
        """How many seconds it takes; 0 where there is one already, for what another slot has met."""
        with self._lock:
            if self.why:
                return 0.0
            self._seconds = min(max(FIRST_PAUSE_S, 2 * self._seconds), LAST_PAUSE_S)
            self._until, self._why = time.monotonic() + self._seconds, why
            return self._seconds

    def end(self) -> None:
        """An attempt has gone well: the next pause is a first one."""
        with self._lock:
            self._seconds = self._until = 0.0
