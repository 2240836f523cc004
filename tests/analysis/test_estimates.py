"""Statistics against scipy, simulation, and numbers written down."""

import math

import numpy as np
import pytest
from scipy import stats

from rope_lm.analysis.estimates import (
    Crossing,
    crossing,
    detectable,
    difference,
    fewest_pairs,
    holm,
    interval,
    noise_floor,
    sign_flip,
    speedup,
    t_test,
    two_one_sided,
    within,
)


def test_a_crossing_is_interpolated_in_log_steps() -> None:
    steps, nats = np.array([0, 10, 100, 1000]), np.array([6.0, 4.0, 2.0, 1.0])
    assert crossing(steps, nats, 3.0) == (pytest.approx(math.sqrt(10 * 100)), False)
    assert crossing(steps, nats, 2.0) == (pytest.approx(100), False)
    assert crossing(steps, nats, 5.0) == (pytest.approx(math.sqrt(1 * 10)), False)
    assert crossing(steps, nats, 7.0) == (1.0, False)
    assert crossing(steps, nats, 0.5) == (1000.0, True)


def test_the_first_crossing_counts_and_nan_is_none() -> None:
    assert crossing(np.array([1, 10, 100, 1000]), np.array([4, 2, 3, 1.0]), 2.5).steps < 10
    over = crossing(np.array([1, 10, 100]), np.array([4, math.nan, 1.0]), 2.5)
    assert over == (pytest.approx(10), False), "between the evaluations that are finite"
    assert crossing(np.array([1, 10, 100]), np.array([4, math.nan, math.nan]), 2.0) == (100.0, True)


def test_the_interval_is_scipys() -> None:
    values = [0.3, 0.1, 0.5, 0.2]
    ours, theirs = interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert math.isnan(interval([1.0]).low) and interval([1.0]).mean == 1.0
    assert math.isnan(interval([0.1, 0.1, 0.1]).low), "values that are all alike do not say how they spread"


@pytest.mark.parametrize("n", [3, 6, 10])
def test_the_interval_covers_and_the_test_has_its_size(n: int) -> None:
    """4,000 draws of normal log ratios: 95% covered, and at most 5% rejected, within three Monte-Carlo errors."""
    draws = np.random.default_rng(n).normal(0.3, 0.2, (4000, n))
    covered = np.mean([low <= 0.3 <= high for _, low, high in map(interval, draws)])
    error = 3 * math.sqrt(0.95 * 0.05 / 4000)
    assert abs(covered - 0.95) < error
    rejected = np.mean([sign_flip(draw) <= 0.05 for draw in draws[:600] - 0.3])
    assert rejected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)
    if n < 6:
        assert rejected == 0, "five pairs or fewer cannot go below 0.05"


def test_sign_flip_is_exact() -> None:
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip([1.0] * 6) == 2 / 64
    permuted = stats.permutation_test(
        ([0.1, 0.4, -0.2, 0.5, 0.3],), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip([0.1, 0.4, -0.2, 0.5, 0.3]) == pytest.approx(permuted.pvalue)
    assert sign_flip(np.ones(20)) < 1e-3
    assert math.isnan(sign_flip([1.0, math.nan])) and math.isnan(sign_flip([]))


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    # By hand: 5 x 0.004, 4 x 0.01, 3 x 0.012 = 0.036 raised to the 0.04 before it, 2 x 0.5, 1 x 0.9.
    assert holm([0.01, 0.9, 0.004, 0.5, 0.012]) == pytest.approx([0.04, 1.0, 0.02, 1.0, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("comparisons", [1, 2, 3, 4, 5, 19, 20])
def test_the_fewest_pairs_are_those_whose_corrected_p_can_be_below_5_percent(comparisons: int) -> None:
    fewest = fewest_pairs(comparisons)
    enough, too_few = (min(holm([sign_flip(np.ones(pairs))] * comparisons)) for pairs in (fewest, fewest - 1))
    assert enough < 0.05 <= too_few


def seen(*steps: float, censored: bool = False) -> list[Crossing]:
    return [Crossing(step, censored) for step in steps]


def test_a_speedup_is_the_geometric_mean_of_paired_ratios() -> None:
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
        (seen(200, 200), seen(100, 100), "", "inconclusive"),
    ],
)
def test_a_verdict_says_no_more_than_the_censoring_allows(
    baseline: list[Crossing], treatment: list[Crossing], bound: str, verdict: str
) -> None:
    found = speedup(baseline, treatment, 1.0)
    assert (found.bound, found.verdict) == (bound, verdict)


# --- equivalence, power, noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, bound, verdict",
    [
        (0.95, 1.05, "", "supported"),
        (0.95, 1.2, "", "inconclusive"),
        (1.2, 1.3, "", "refuted"),
        (0.5, 0.8, "", "refuted"),
        (0.95, 1.05, "lower", "inconclusive"),
        (1.2, 1.3, "lower", "refuted"),
        (1.2, 1.3, "upper", "inconclusive"),
        (0.5, 0.8, "upper", "refuted"),
        (math.nan, math.nan, "", "inconclusive"),
    ],
)
def test_no_difference_takes_a_whole_interval_within_the_margin(
    low: float, high: float, bound: str, verdict: str
) -> None:
    assert within(low, high, 1 / 1.1, 1.1, bound) == verdict


def test_two_one_sided_tests_agree_with_the_interval() -> None:
    """p < 2.5% exactly where the 95% interval lies within the margin, and p is Schuirmann's by hand."""
    values, margin = [0.01, -0.02, 0.03, 0.0, 0.02, -0.01], 0.05
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(6)
    by_hand = max(stats.t.sf((mean + margin) / error, 5), stats.t.cdf((mean - margin) / error, 5))
    assert two_one_sided(values, -margin, margin) == pytest.approx(by_hand)
    for draw in np.random.default_rng(0).normal(0.02, 0.03, (200, 6)):
        _, low, high = interval(draw)
        inside = within(low, high, -margin, margin, "") == "supported"
        assert inside == (two_one_sided(draw, -margin, margin) < 0.025)
    assert t_test(values, 0.01) == pytest.approx(stats.ttest_1samp(values, 0.01).pvalue)
    for few in ([1.0], [1.0, 1.0]):
        assert math.isnan(t_test(few, 0)) and math.isnan(two_one_sided(few, -1, 1))


def test_arms_that_differ_by_the_margin_are_seldom_called_equivalent() -> None:
    """At a true difference of the margin itself, 2.5% of 1,500 studies may say so, within three Monte-Carlo errors."""
    draws = np.random.default_rng(1).normal(0.1, 0.05, (1500, 6))
    wrong = np.mean([two_one_sided(draw, -0.1, 0.1) < 0.025 for draw in draws])
    assert wrong < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 1500)


@pytest.mark.parametrize("n, expected", [(6, 1.4346), (10, 0.9962), (30, 0.5292)])
def test_the_detectable_effect_is_found_in_four_of_five_studies(n: int, expected: float) -> None:
    """Against G*Power's figures for a paired t test at 5% (two-sided) and 80% power, and by simulation."""
    effect = detectable(1.0, n)
    assert effect == pytest.approx(expected, abs=2e-4) and detectable(0.5, n) == pytest.approx(effect / 2)
    draws = np.random.default_rng(n).normal(effect, 1.0, (20_000, n))
    t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(n)
    power = np.mean(t > stats.t.ppf(0.975, n - 1))
    assert abs(power - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 20_000)
    assert math.isnan(detectable(1.0, 1)) and math.isnan(detectable(0.0, 6))


def test_the_noise_floor_holds_what_it_says() -> None:
    """A band from 5 arms of 3 pairs each holds 95% of the mean log ratios of 3 new pairs, on average."""
    random, held, found = np.random.default_rng(2), [], []
    for _ in range(1500):
        logs = random.normal(0, 0.1, (6, 3))
        arms = [speedup(seen(*np.exp(pairs)), seen(1, 1, 1), 1.0) for pairs in logs]
        noise = noise_floor(arms[:5], 3)
        held.append(noise.low <= arms[5].mean <= noise.high)
        found.append(noise.positives / noise.tested)
    assert noise.pairs == 15 and noise.tested == 5 and noise.low == pytest.approx(1 / noise.high)
    assert abs(np.mean(held) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 1500)
    assert abs(np.mean(found) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 7500), "false positives come at their nominal rate"
    assert math.isnan(noise_floor([], 3).low)
    alike = speedup(seen(2, 2), seen(1, 1), 1.0)
    assert noise_floor([alike], 2).tested == noise_floor([alike], 2).positives == 0, (
        "an arm without an interval has no verdict"
    )


def test_a_difference_is_paired() -> None:
    found = difference([2.0, 3.0, 4.0], [1.0, 1.5, 2.0])
    theirs = stats.ttest_rel([2.0, 3.0, 4.0], [1.0, 1.5, 2.0]).confidence_interval(0.95)
    assert found.mean == 1.5 and found.values == (1.0, 1.5, 2.0)
    assert (found.low, found.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
