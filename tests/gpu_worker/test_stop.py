"""What ends the work on a job, step by step, with everything around it made up."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpu_worker import stop as stops
from gpu_worker.stop import TOLD_TO_STOP, Stop, Stopped
from jobqueue.job import FailureReason
from jobqueue.settings import Settings


class Around:
    """A trainer that trains, its checkpoints, and a worker that may be drained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.drained, self.asked, self.ended = 1000.0, False, 0, False
        monkeypatch.setattr(stops, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.keeper = SimpleNamespace(kept=0)
        trainer = SimpleNamespace(ask_checkpoint=self._ask, stop=self._stop)
        lease = SimpleNamespace(cancelled=threading.Event())
        watch = SimpleNamespace(health=SimpleNamespace(ends_jobs=False), look=lambda: None)
        settings = Settings(grace_s=10)
        parts: list[Any] = [lease, lambda: self.drained, self.keeper, trainer, watch, settings, None, None]
        self.stop = Stop(*cast(Any, parts))
        self.stop.can_save = True

    def _ask(self) -> None:
        self.asked += 1

    def _stop(self) -> None:
        self.ended = True

    def look(self, after_s: float = 0.0) -> None:
        self.now += after_s
        self.stop.heard_at = self.now
        self.stop.look()


def test_a_drain_waits_for_a_checkpoint_for_the_grace_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    around = Around(monkeypatch)
    around.look()
    around.drained = True
    around.look()
    around.look(9)
    assert (around.asked, around.ended) == (1, False)
    around.look(2)
    assert around.stop.begun == Stopped(FailureReason.PREEMPTED, TOLD_TO_STOP)
    assert around.ended


def test_a_second_drain_asks_for_a_checkpoint_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the trainer at once, since the first one's time was over, and what had come since was trained again."""
    around = Around(monkeypatch)
    around.drained = True
    around.look()
    around.drained = False
    around.look(5)
    around.drained = True
    around.look(60)
    assert (around.asked, around.ended) == (2, False)
    around.keeper.kept += 1
    around.look()
    assert around.ended
