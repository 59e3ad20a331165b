"""Is a difference real: intervals and tests. scipy and statsmodels are imported where a worker makes a report.

A laptop has neither: it reads the numbers from the report.
"""

from __future__ import annotations

import math
from collections import Counter
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
    """The interval of `bootstrap_mean` of a difference of accuracies, in percentage points.

    A question is a gain, a loss or neither, and the difference depends on how many there are of each.
    """
    return _resampled([100, -100, 0], [gained, lost, questions - gained - lost])


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """The 95% percentile interval of the mean, over resampled questions (Efron 1979); one value for each question."""
    counts = sorted(Counter(values).items())
    return _resampled([value for value, _ in counts], [count for _, count in counts])


def _resampled(values: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Of the mean of `values`, of which each occurs so often: drawing all of them with replacement is drawing these
    counts from a multinomial distribution."""
    import numpy

    n = sum(counts)
    drawn = numpy.random.default_rng(SEED).multinomial(
        n, numpy.array(counts) / n, size=RESAMPLES
    )  # (resamples, values)
    low, high = numpy.quantile(drawn @ numpy.array(values) / n, [0.025, 0.975])
    return round(float(low), 6), round(float(high), 6)


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p-value of the signed-rank test that the paired differences lie around 0 (Wilcoxon 1945).

    Pairs without a difference do not count, as in McNemar's test.
    """
    from scipy import stats

    return float(stats.wilcoxon(differences).pvalue) if any(differences) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, each as large as its test weighs among so many (Holm 1979), in the same order."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def krippendorff_alpha(ratings: Sequence[Sequence[float]]) -> float | None:
    """Agreement of raters on an ordinal scale (Krippendorff 2004): 1 is perfect, 0 what chance alone would give.

    Args:
        ratings: for each rater, the score of each unit; NaN where there is none.

    Returns None where all scores are alike: there is nothing to agree about.
    """
    import krippendorff

    if len({score for of_one in ratings for score in of_one if not math.isnan(score)}) < 2:
        return None
    return round(float(krippendorff.alpha(reliability_data=ratings, level_of_measurement="ordinal")), 6)
