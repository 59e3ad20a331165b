"""Seconds per phase of a job."""

from __future__ import annotations

import time


class Clock:
    """A phase may come in several laps; they add up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.begun = self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap (or the beginning) went into `phase`."""
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self.last
        self.last = now

    def move(self, part: str, to: str, seconds: float) -> None:
        """Some of one part was another."""
        if seconds:
            self.laps[part] -= seconds
            self.laps[to] = self.laps.get(to, 0.0) + seconds

    def report(self) -> dict[str, float]:
        laps = {phase: round(seconds, 3) for phase, seconds in self.laps.items()}
        return laps | {"total_s": round(time.perf_counter() - self.begun, 3)}
