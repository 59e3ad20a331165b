"""What a worker adds to the progress of its attempts; pure."""

from __future__ import annotations

from gpu_worker.pace import Pace
from gpu_worker.protocol import Progress
from jobqueue.memory import GIB


def train(step: int | None, **fields: int) -> Progress:
    return Progress("train", step=step, steps=20, **fields)


def test_the_pace_is_that_of_the_steps_seen_in_a_phase() -> None:
    pace = Pace(lambda: GIB, 0)

    assert pace.seen(Progress("load"), 90.0).seconds_per_step is None
    assert pace.seen(train(4), 100.0).seconds_per_step is None, "how many it did before, and when, nobody knows"
    assert pace.seen(train(4), 105.0).seconds_per_step is None
    assert pace.seen(train(8), 108.0).seconds_per_step == 2.0
    assert pace.seen(Progress("evaluate", step=10, steps=50), 110.0).seconds_per_step is None, "another phase"
    assert pace.seen(Progress("evaluate", step=20, steps=50), 111.0).seconds_per_step == 0.1
    assert pace.seen(train(9), 120.0).seconds_per_step is None, "and back"
    assert pace.seen(train(1), 121.0).seconds_per_step is None, "from the beginning, after memory ran out"
    assert pace.seen(train(2), 124.0).seconds_per_step == 3.0


def test_the_peak_is_the_most_that_was_seen_with_what_the_allocator_does_not_know() -> None:
    promised = iter([8 * GIB, 8 * GIB, 6 * GIB])
    pace = Pace(lambda: next(promised), GIB)

    first = pace.seen(train(1), 1.0)
    second = pace.seen(train(1, reserved_bytes=3 * GIB), 1.0)
    third = pace.seen(train(1, reserved_bytes=2 * GIB), 1.0)

    assert (first.peak_bytes, first.promised_bytes) == (None, 8 * GIB)
    assert (second.reserved_bytes, second.peak_bytes) == (3 * GIB, 4 * GIB)
    assert (third.reserved_bytes, third.peak_bytes, third.promised_bytes) == (2 * GIB, 4 * GIB, 6 * GIB)
