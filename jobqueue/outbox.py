"""Batches that have ended, of which somebody is still to be told; see jobqueue/notification.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobqueue.notification import Told, read_told, write_told
from jobqueue.records import PREFIX, Records


@dataclass(frozen=True)
class ToTell:
    """A batch of whose end somebody is to be told, now by this worker."""

    batch: str
    until: str  # when another worker may take it over, as the store has it, in ms: proof that none has
    ended_at: str  # likewise; tells one end from that after a retry
    told: tuple[Told, ...]


class Outbox(Records):
    """A control worker's calls."""

    def to_tell(self, hold_s: float) -> ToTell | None:
        """A batch that has ended, of which nobody else will tell for so long; None: there is none now."""
        answer = self._call("to_tell", int(hold_s * 1000))
        if not answer:
            return None
        batch, until, ended_at, told = answer
        return ToTell(batch, until, ended_at or "", read_told(told))

    def is_to_be_told(self, batch: str) -> bool:
        """Whether somebody is still to be told of its end."""
        with self._errors():
            return self._redis.zscore(f"{PREFIX}to_tell", batch) is not None

    def told(self, what: ToTell, told: Sequence[Told], tried: Sequence[str], again_s: float | None) -> None:
        """How far the telling has come, and in how many seconds it goes on; None: it is over.

        `tried` are the results of the tries since, for the counters. Where another worker has taken it over, or the
        batch has been run again, the rest is theirs to say.
        """
        delay = -1 if again_s is None else int(again_s * 1000)
        self._call("told", what.batch, what.until, what.ended_at, write_told(told), delay, *tried)
