"""What a worker adds to the progress of its attempts: how fast it goes, and how much of its promise it has needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpu_worker.protocol import Progress


class Pace:
    """Sees all that one attempt says of its progress.

    Args:
        promised: the bytes that the job may hold now, see `Admission`.
        context_bytes: what it holds beside what its allocator does.
    """

    def __init__(self, promised: Callable[[], int], context_bytes: int) -> None:
        self._promised, self._context_bytes = promised, context_bytes
        self._phase, self._first_step, self._first_at = "", 0, 0.0
        self._peak_bytes = 0

    def seen(self, event: Progress, now: float) -> Progress:
        """The event with what is known by now; `now` is of any clock that counts seconds."""
        if event.reserved_bytes:
            self._peak_bytes = max(self._peak_bytes, event.reserved_bytes + self._context_bytes)
        return replace(
            event,
            seconds_per_step=self._seconds_per_step(event, now),
            peak_bytes=self._peak_bytes or None,
            promised_bytes=self._promised(),
        )

    def _seconds_per_step(self, event: Progress, now: float) -> float | None:
        """Since the phase's first word, which came after what is slow only once; None until then."""
        if event.step is None:
            return None
        if event.phase != self._phase or event.step < self._first_step:
            self._phase, self._first_step, self._first_at = event.phase, event.step, now
        done = event.step - self._first_step
        return round((now - self._first_at) / done, 4) if done else None
