"""A cluster in which much goes wrong for half a minute; benchmarks/soak.py does the same for half an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import Chaos
from invariants import Stint, overlaps, stints, thrown_away


def test_every_job_ends_once_and_alone_whatever_fails_around_it(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=11, hosts=3)
    try:
        verdict = chaos.run(24, pause_s=(0.2, 1.0), backlog=18, jobs=24)
    finally:
        chaos.close()

    assert verdict.problems == [], verdict.text()
    assert verdict.figures["jobs"] >= 24
    assert verdict.figures["faults"] >= 20
    assert verdict.figures["succeeded"] >= verdict.figures["jobs"] / 2


def test_two_trainers_that_overlap_are_noticed() -> None:
    alone = [Stint(1, 0.0, 1.0, 20), Stint(2, 1.5, 2.0, 10)]

    assert overlaps(alone) == []
    assert overlaps([*alone, Stint(3, 1.9, 2.5, 12)]) == ["trainers 2 and 3 overlap by 0.10 s"]


def test_seconds_at_steps_that_were_done_again_are_thrown_away(tmp_path: Path) -> None:
    """The first trainer loads for a second and does four steps, the second goes on from the checkpoint of step 2."""
    first = [(11, 10.05 + 0.05 * beat, 0) for beat in range(20)] + [(11, 12.0, 1), (11, 13.0, 2), (11, 14.0, 3)]
    second = [(22, 20.05 + 0.05 * beat, 0) for beat in range(10)] + [(22, 21.5, 3), (22, 22.5, 4)]
    beats = tmp_path / "b.1"
    beats.write_text("".join(f"{pid} {at:.3f} {step}\n" for pid, at, step in first + second) + "22 22.6")

    found = stints(beats)

    assert [(stint.pid, stint.beats) for stint in found] == [(11, 23), (22, 12)]
    assert thrown_away(found) == pytest.approx(1.0 + 1.0), "the loading and step 3"
    assert thrown_away(found[:1]) == 0
