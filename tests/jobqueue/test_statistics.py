"""Intervals and tests against published examples, and against another way to the same number."""

from __future__ import annotations

import numpy
import pytest
from scipy import stats

from jobqueue.statistics import bootstrap, bootstrap_mean, holm, mcnemar, wilcoxon, wilson


@pytest.mark.parametrize(
    ("correct", "questions", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson(correct: int, questions: int, low: float, high: float) -> None:
    """81/263 and 15/148: Newcombe (1998), Two-sided confidence intervals for the single proportion, table I."""
    assert wilson(correct, questions) == pytest.approx((low, high), abs=1e-4)
    other = stats.binomtest(correct, questions).proportion_ci(0.95, method="wilson")
    assert wilson(correct, questions) == pytest.approx((other.low, other.high), abs=1e-9)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (7, 1, 0.0703125),
        (1, 7, 0.0703125),
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (6, 0, 2 / 2**6),
        (12, 3, 2 * (1 + 15 + 105 + 455) / 2**15),
    ],
)
def test_mcnemar(gained: int, lost: int, p: float) -> None:
    """lm-eval#3831: an unpaired test on paired data.

    7 and 1: airway hyper-responsiveness in 21 children (Bentur et al. 2009), of which Fagerland, Lydersen and Laake
    (2013), The McNemar test for binary matched-pairs data, say: exact conditional, p = 0.070."""
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("gained", "lost", "questions"), [(7, 1, 21), (60, 31, 200), (140, 90, 1273)])
def test_bootstrap_is_that_of_resampled_questions(gained: int, lost: int, questions: int) -> None:
    """Against scipy's bootstrap of the questions themselves; the differences lie on a grid of 1/questions."""
    each = numpy.repeat([100.0, -100.0, 0.0], [gained, lost, questions - gained - lost])
    other = stats.bootstrap(
        (each,), numpy.mean, n_resamples=20_000, batch=1_000, method="percentile", rng=numpy.random.default_rng(1)
    ).confidence_interval

    assert bootstrap(gained, lost, questions) == pytest.approx((other.low, other.high), abs=1.01 * 100 / questions)
    assert bootstrap(gained, lost, questions) == bootstrap(gained, lost, questions)


def test_bootstrap_without_a_change_has_no_width() -> None:
    assert bootstrap(0, 0, 100) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.000040, 0.016100, 0.612300], [0.000120, 0.032200, 0.612300]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.04], [0.04]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    """The first is the example of Wikipedia's "Holm-Bonferroni method"; the second that of Abdi (2010), Holm's
    sequential Bonferroni procedure."""
    assert holm(p_values) == pytest.approx(adjusted)


def test_wilcoxon() -> None:
    """Darwin's maize, crossed against self-fertilised plants, in eighths of an inch; Fisher (1935), The Design of
    Experiments, table 3. W is 24, of which the exact distribution gives the p-value."""
    darwin = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert wilcoxon(darwin) == pytest.approx(0.0413, abs=1e-4)
    assert wilcoxon([0, 0, 0]) == 1
    assert wilcoxon([0, 0, *darwin]) == pytest.approx(wilcoxon(darwin), abs=0.005)  # where there is none, none counts


def test_bootstrap_of_a_mean_is_that_of_scipy_and_of_the_difference_of_accuracies() -> None:
    values = [1.0, 2.5, 2.5, 3.0, 4.0, 4.0, 4.5, 5.0, 5.0, 2.0] * 5
    other = stats.bootstrap(
        (values,), numpy.mean, n_resamples=20_000, method="percentile", rng=numpy.random.default_rng(1)
    ).confidence_interval
    assert bootstrap_mean(values) == pytest.approx((other.low, other.high), abs=0.03)
    assert bootstrap_mean([3, 3, 3]) == (3, 3)
    turned = [100.0] * 12 + [-100.0] * 3 + [0.0] * 25
    assert bootstrap_mean(turned) == pytest.approx(bootstrap(12, 3, 40), abs=2)
