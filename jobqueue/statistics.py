"""Is a difference real: intervals and tests. scipy and statsmodels are imported where a worker makes a report.

A laptop has neither: it reads the numbers from the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SEED = 3407  # of the bootstrap: the same answers make the same report
RESAMPLES = 20_000


def wilson(correct: int, questions: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): honest for few questions, and near 0 and 1. No scipy needed."""
    z = 1.959963984540054
    share, scale = correct / questions, 1 + z * z / questions
    middle = (share + z * z / (2 * questions)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / questions + z * z / (4 * questions * questions))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact test that `gained` and `lost` are equally likely (McNemar 1947).

    Dror et al. (2018) recommend it for accuracy: only the questions count that one model has right and the other wrong.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def bootstrap(gained: int, lost: int, questions: int) -> tuple[float, float]:
    """The 95% percentile interval of the difference, in percentage points, over resampled questions (Efron 1979).

    A question is a gain, a loss or neither, and the difference depends on how many there are of each: drawing
    `questions` of them with replacement is drawing these counts from a multinomial distribution.
    """
    import numpy

    shares = numpy.array([gained, lost, questions - gained - lost]) / questions
    drawn = numpy.random.default_rng(SEED).multinomial(questions, shares, size=RESAMPLES)  # (resamples, 3)
    low, high = numpy.quantile(100 * (drawn[:, 0] - drawn[:, 1]) / questions, [0.025, 0.975])
    return round(float(low), 6), round(float(high), 6)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, each as large as its test weighs among so many (Holm 1979), in the same order."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []
