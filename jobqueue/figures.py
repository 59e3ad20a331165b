"""What monitors want to know of a server, at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobqueue.job import WorkerInfo
from jobqueue.overview import live_of, workers_of


@dataclass(frozen=True)
class Figures:
    """Counts of the whole cluster; those that only grow last as long as the server's data."""

    live: Mapping[tuple[str, str], int]  # kind and state -> jobs that have not ended
    queued: Mapping[str, int]  # memory class -> jobs that can be claimed
    oldest_s: Mapping[str, float]  # memory class -> how long the first of them has been waiting
    totals: Mapping[tuple[str, ...], int]  # what has ever happened; see `count` in store.lua
    waits_s: tuple[float, ...]  # bounds of the buckets of waits and of durations
    durations_s: tuple[float, ...]
    workers: Sequence[WorkerInfo]
    memory_bytes: int  # that the server uses, and may use; 0: no limit
    memory_limit_bytes: int

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Figures:
        """Of the function `figures` in store.lua."""
        used, limit = answer["memory"]
        return cls(
            live=live_of(answer),
            queued=dict(answer["classes"]),
            oldest_s={queue: max(0.0, answer["now"] - since) / 1000 for queue, since in answer["oldest"].items()},
            totals={tuple(name.split(":")): int(value) for name, value in answer["totals"].items()},
            waits_s=tuple(answer["waits"]),
            durations_s=tuple(answer["durations"]),
            workers=workers_of(answer),
            memory_bytes=int(used),
            memory_limit_bytes=int(limit),
        )
