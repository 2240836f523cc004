"""Statistics against scipy, simulation, and numbers written down."""

import math

import numpy as np
import pytest
from scipy import stats

from rope_lm.analysis.convergence import Crossing, crossing, holm, interval, sign_flip, speedup


def test_a_crossing_is_interpolated_in_log_steps():
    steps, nats = np.array([0, 10, 100, 1000]), np.array([6.0, 4.0, 2.0, 1.0])
    assert crossing(steps, nats, 3.0) == (pytest.approx(math.sqrt(10 * 100)), False)
    assert crossing(steps, nats, 2.0) == (pytest.approx(100), False)
    assert crossing(steps, nats, 5.0) == (pytest.approx(math.sqrt(1 * 10)), False)
    assert crossing(steps, nats, 7.0) == (1.0, False)
    assert crossing(steps, nats, 0.5) == (1000.0, True)


def test_the_first_crossing_counts_and_nan_is_none():
    assert crossing(np.array([1, 10, 100, 1000]), np.array([4, 2, 3, 1.0]), 2.5).steps < 10
    assert crossing(np.array([1, 10, 100]), np.array([4, math.nan, 1.0]), 2.0).censored is False
    assert crossing(np.array([1, 10, 100]), np.array([4, math.nan, math.nan]), 2.0) == (100.0, True)


def test_the_interval_is_scipys():
    values = [0.3, 0.1, 0.5, 0.2]
    ours, theirs = interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert math.isnan(interval([1.0]).low) and interval([1.0]).mean == 1.0


@pytest.mark.parametrize("n", [3, 6, 10])
def test_the_interval_covers_and_the_test_has_its_size(n):
    """4,000 draws of normal log ratios: 95% covered, and at most 5% rejected, within three Monte-Carlo errors."""
    draws = np.random.default_rng(n).normal(0.3, 0.2, (4000, n))
    covered = np.mean([low <= 0.3 <= high for _, low, high in map(interval, draws)])
    error = 3 * math.sqrt(0.95 * 0.05 / 4000)
    assert abs(covered - 0.95) < error
    rejected = np.mean([sign_flip(draw) <= 0.05 for draw in draws[:600] - 0.3])
    assert rejected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)
    if n < 6:
        assert rejected == 0, "five pairs or fewer cannot go below 0.05"


def test_sign_flip_is_exact():
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip([1.0] * 6) == 2 / 64
    permuted = stats.permutation_test(
        ([0.1, 0.4, -0.2, 0.5, 0.3],), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip([0.1, 0.4, -0.2, 0.5, 0.3]) == pytest.approx(permuted.pvalue)
    assert sign_flip(np.ones(20)) < 1e-3


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def seen(*steps: float, censored: bool = False) -> list[Crossing]:
    return [Crossing(each, censored) for each in steps]


def test_a_speedup_is_the_geometric_mean_of_paired_ratios():
    found = speedup(seen(200, 400, 800), seen(100, 100, 400), 1.5)
    assert found.mean == pytest.approx((2 * 4 * 2) ** (1 / 3)) and found.n == 3 and found.bound == ""
    logs = np.log([2, 4, 2])
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / math.sqrt(3)
    assert found.low == pytest.approx(math.exp(logs.mean() - half)) and found.p == 0.25


@pytest.mark.parametrize(
    "baseline, treatment, bound, verdict",
    [
        (seen(200, 210, 205), seen(100, 101, 102), "", "supported"),
        (seen(100, 101, 102), seen(200, 210, 205), "", "refuted"),
        (seen(100, 200, 150), seen(150, 120, 160), "", "inconclusive"),
        (seen(200, 210, 205, censored=True), seen(100, 101, 102), "lower", "supported"),
        (seen(100, 101, 102, censored=True), seen(200, 210, 205), "lower", "inconclusive"),
        (seen(200, 210, 205), seen(100, 101, 102, censored=True), "upper", "inconclusive"),
        (seen(100, 101, 102), seen(200, 210, 205, censored=True), "upper", "refuted"),
        (seen(200, 210, 205, censored=True), seen(100, 101, 102, censored=True), "unknown", "inconclusive"),
        (seen(200), seen(100), "", "inconclusive"),
    ],
)
def test_a_verdict_says_no_more_than_the_censoring_allows(baseline, treatment, bound, verdict):
    found = speedup(baseline, treatment, 1.0)
    assert (found.bound, found.verdict) == (bound, verdict)
