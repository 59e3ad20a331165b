"""A cluster in which much goes wrong for half a minute; benchmarks/soak.py does the same for half an hour."""

from __future__ import annotations

from pathlib import Path

from driver import Chaos
from invariants import Stint, overlaps


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
