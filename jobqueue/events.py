"""A job's stream of progress and log lines: append (fenced, by the attempt that runs it) and follow (by anyone)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

EventKind = Literal["log", "progress", "answer", "state"]


@dataclass(frozen=True)
class Event:
    """One entry of a job's stream."""

    id: str  # the stream's id: where to go on reading
    kind: EventKind
    attempt: int
    at: float  # seconds since the epoch, by the server's clock
    text: str  # of a log line; of a state event, the state and why
    data: dict[str, Any]  # of progress and of an answer, see gpu_worker.protocol

    @classmethod
    def from_entry(cls, entry_id: str, fields: Mapping[str, str]) -> Event:
        body = fields["body"]
        kind: EventKind = fields["kind"]  # type: ignore[assignment]
        structured = kind in ("progress", "answer")
        return cls(
            id=entry_id,
            kind=kind,
            attempt=int(fields["attempt"]),
            at=int(entry_id.split("-")[0]) / 1000,
            text="" if structured else body,
            data=json.loads(body) if structured else {},
        )
