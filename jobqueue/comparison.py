"""Two models on the questions that both were asked, and what may be said of the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jobqueue import statistics
from jobqueue.answers import Answers

SIGNIFICANT = 0.05
Finding = Literal["better", "worse", "no difference shown", "not tested"]


@dataclass(frozen=True)
class Comparison:
    """One model against another, by the primary metric."""

    points: float  # difference of the accuracies in percentage points; positive: better than the other
    gained: int | None = None  # questions that it has right and the other wrong; None: not paired
    lost: int | None = None  # questions that it has wrong and the other right
    p_value: float | None = None  # of the exact McNemar test, two-sided, by itself
    p_holm: float | None = None  # corrected for the trials of the batch that were tested beside it
    interval: tuple[float, float] | None = None  # of the difference, in points: 95%, paired bootstrap
    finding: Finding = "not tested"


def compare(one: float, other: float, mine: Answers, theirs: Answers, metric: str) -> Comparison:
    """On the questions that both were asked: one may have left out some that were too long for it.

    Args:
        one, other: the accuracies, 0 to 1: all that can be compared where the answers are not at hand.
        mine, theirs: the answers, by question.
        metric: whose picks count.
    """
    both = mine.keys() & theirs.keys()
    if not both:
        return Comparison(round(100 * (one - other), 6))
    gained = sum(metric in mine[index].right - theirs[index].right for index in both)
    lost = sum(metric in theirs[index].right - mine[index].right for index in both)
    p_value = statistics.mcnemar(gained, lost)
    return Comparison(
        points=round(100 * (gained - lost) / len(both), 6),
        gained=gained,
        lost=lost,
        p_value=p_value,
        interval=statistics.bootstrap(gained, lost, len(both)),
        finding=finding(gained - lost, p_value),
    )


def corrected(comparisons: Sequence[Comparison | None]) -> list[Comparison | None]:
    """Those of one batch, each tested as one among many: of twenty trials that change nothing, one looks better."""
    tested = [c.p_value for c in comparisons if c is not None and c.p_value is not None]
    p_values = iter(statistics.holm(tested))
    return [c if c is None or c.p_value is None else _corrected(c, next(p_values)) for c in comparisons]


def _corrected(comparison: Comparison, p_holm: float) -> Comparison:
    return replace(comparison, p_holm=p_holm, finding=finding(comparison.points, p_holm))


def finding(difference: float, p_value: float) -> Finding:
    """What may be said of a difference whose test has this p-value."""
    if p_value >= SIGNIFICANT:
        return "no difference shown"
    return "better" if difference > 0 else "worse"
