"""Estimates of how much faster one arm reaches a loss than another, and how certain they are.

Seeds are paired: a seed fixes initial values and data order in every arm, so the log ratio within a seed is averaged.
Intervals are Student's t on the logs: at five seeds percentile and BCa bootstraps cover 85%, t covers 97.7%.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
POWER = 0.8  # of the smallest detectable effect
MARGIN = 1.1  # speed-ups between 1/1.1 and 1.1 are equivalent: the smallest published ones are "10-20%"
# (baseline censored, treatment censored) -> which kind of bound the speed-up is.
BOUND = {(False, False): "", (True, False): "lower", (False, True): "upper", (True, True): "unknown"}
Values = Sequence[float] | np.ndarray


class Estimate(NamedTuple):
    """A mean and its 95% interval. The ends are nan for fewer than two values, or if all values are equal."""

    mean: float
    low: float
    high: float


class Crossing(NamedTuple):
    """The step at which a curve first reaches a target."""

    steps: float  # the last step of the curve if it never does
    censored: bool  # True if it never does


class Effect(NamedTuple):
    """The treatment compared with the baseline over pairs of seeds.

    A speed-up is the ratio of the baseline's steps (seconds, FLOPs) to the treatment's, a geometric mean over pairs. A
    difference is the baseline's value minus the treatment's, a mean over pairs.
    """

    mean: float
    low: float  # of the 95% interval, as in Estimate
    high: float
    p: float  # two-sided, exact sign-flip test
    values: tuple[float, ...]  # one per pair: the log ratio, or the difference
    bound: str = ""  # "lower", "upper" or "unknown" if censored or missing pairs make it a bound
    target: float = math.nan  # validation loss that is reached; of a speed-up
    verdict: str = ""  # supported, refuted, inconclusive; in a contrast also equivalent; of a speed-up

    @property
    def n(self) -> int:
        """Pairs of seeds."""
        return len(self.values)


def crossing(steps: np.ndarray, nats: np.ndarray, target: float) -> Crossing:
    """Return the step at which a curve first is at or below `target`, interpolated in log(step) between evaluations."""
    last, finite = float(steps[-1]), np.isfinite(nats)
    steps, nats = steps[finite], nats[finite]
    below = np.flatnonzero(nats <= target)
    if not len(below):
        return Crossing(last, True)
    at = below[0]
    if at == 0:
        return Crossing(max(float(steps[0]), 1.0), False)
    before, after = math.log(max(steps[at - 1], 1)), math.log(max(steps[at], 1))
    share = (nats[at - 1] - target) / (nats[at - 1] - nats[at])
    return Crossing(math.exp(before + share * (after - before)), False)


def interval(values: Values) -> Estimate:
    """Return the mean and Student's t interval. Equal values give no interval: they do not show how they vary."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else math.nan
    if not _vary(values):
        return Estimate(mean, math.nan, math.nan)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def _vary(values: Values) -> bool:
    """Return True if there are at least two values and they differ by more than rounding."""
    return len(values) > 1 and bool(np.ptp(values) > 1e-12 * np.max(np.abs(values)))


def sign_flip(values: Values) -> float:
    """Return the exact two-sided p of the mean over all 2^n changes of sign; nan if a value is nan, or without values.

    The p is at least 2^(1-n), and k times that after correction over k comparisons. To be below 0.05 it needs six pairs
    for one comparison, and eight for four or five. Beyond 16 pairs, 2^16 random sign changes are used instead of all.
    """
    values = np.asarray(values, float)
    if not len(values) or np.isnan(values).any():
        return math.nan
    means = np.abs(_signs(len(values)) @ values)
    return float(np.mean(means >= means[0] * (1 - 1e-12)))


@cache
def _signs(n: int) -> np.ndarray:
    """Return [2^n n] signs; the first row is all 1."""
    if n <= 16:
        return np.array(list(itertools.product([1, -1], repeat=n)))
    signs = np.random.default_rng(0).choice([1, -1], size=(2**16, n))
    signs[0] = 1
    return signs


def fewest_pairs(comparisons: int) -> int:
    """Return the fewest pairs with which a sign-flip p, corrected over `comparisons`, can be below 0.05."""
    return math.floor(math.log2(comparisons / (1 - LEVEL))) + 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction, in the order given."""
    order = np.argsort(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def difference(baseline: Values, treatment: Values) -> Effect:
    """Return the paired difference, baseline minus treatment."""
    values = np.subtract(baseline, treatment)
    return Effect(*interval(values), sign_flip(values), tuple(values.tolist()))


def speedup(baseline: Sequence[Crossing], treatment: Sequence[Crossing], target: float) -> Effect:
    """Return the treatment's speed-up over the baseline from paired crossings of one target.

    A censored baseline makes a pair's ratio a lower bound, which is conservative. A censored treatment makes it an
    upper bound, which cannot support a claim. If both are censored, the pair's ratio is unknown.
    """
    pairs = list(zip(baseline, treatment, strict=True))
    logs = [math.log(b.steps / t.steps) for b, t in pairs]
    kinds = {BOUND[b.censored, t.censored] for b, t in pairs} - {""}
    bound = "" if not kinds else kinds.pop() if len(kinds) == 1 else "unknown"
    mean, low, high = (math.exp(value) for value in interval(logs))
    verdict = judge(low, high, 1.0, bound)
    return Effect(mean, low, high, sign_flip(logs), tuple(logs), bound, target, verdict)


def judge(low: float, high: float, threshold: float, bound: str) -> str:
    """Return whether an interval shows a value above `threshold`: supported, refuted or inconclusive.

    A lower bound can support but not refute; an upper bound can refute but not support.
    """
    if low > threshold and bound in ("", "lower"):
        return "supported"
    if high < threshold and bound in ("", "upper"):
        return "refuted"
    return "inconclusive"


def within(low: float, high: float, least: float, most: float, bound: str) -> str:
    """Return whether an interval shows a value between `least` and `most`.

    Supported if the whole interval lies between them (two one-sided tests at 2.5% each), refuted if none of it does,
    otherwise inconclusive.
    """
    if least < low and high < most and bound == "":
        return "supported"
    mirrored = {"lower": "upper", "upper": "lower"}.get(bound, bound)
    if "supported" in (judge(low, high, most, bound), judge(-high, -low, -least, mirrored)):
        return "refuted"
    return "inconclusive"


def t_test(values: Values, at: float) -> float:
    """Return the two-sided p of Student's t test that the mean is `at`; nan if there is no interval."""
    return float(stats.ttest_1samp(values, at).pvalue) if _vary(values) else math.nan


def two_one_sided(values: Values, least: float, most: float) -> float:
    """Return the p of the hypothesis that the mean lies outside (least, most); nan if there is no interval.

    It is the larger p of two one-sided t tests (Schuirmann 1987).
    """
    if not _vary(values):
        return math.nan
    above = stats.ttest_1samp(values, least, alternative="greater").pvalue
    return float(max(above, stats.ttest_1samp(values, most, alternative="less").pvalue))


def detectable(deviation: float, n: int) -> float:
    """Return the smallest mean of `n` paired values that a two-sided t test at 5% detects in 80% of studies.

    `deviation` is the standard deviation of the values. nan for fewer than two values.
    """
    if n < 2 or not deviation > 0:
        return math.nan
    edge = stats.t.ppf((1 + LEVEL) / 2, n - 1)

    def missing_power(shift: float) -> float:  # verdicts in the right direction: noncentral t
        return stats.nct.sf(edge, n - 1, shift) - POWER

    return deviation * optimize.brentq(missing_power, 0.1, 30.0) / math.sqrt(n)


class NoiseFloor(NamedTuple):
    """Speed-ups of arms over themselves on different seeds (A/A): the noise of a speed-up."""

    low: float  # 95% of speed-ups that are truly 1, from as many pairs as the comparison has, lie between low and high
    high: float
    deviation: float  # of the log ratio of two seeds
    pairs: int  # over all arms
    tested: int  # arms that have an interval, and so can have a verdict
    positives: int  # of those, found faster or slower than themselves: false positives


def noise_floor(ratios: Sequence[Effect], n: int) -> NoiseFloor:
    """Return the noise floor at `n` pairs, pooled from the speed-ups of arms over themselves.

    Their log ratios have mean zero by construction, so each of them counts as a degree of freedom.
    """
    logs = np.array([log for ratio in ratios for log in ratio.values])
    if not len(logs) or not n:
        return NoiseFloor(math.nan, math.nan, math.nan, len(logs), 0, 0)
    deviation = math.sqrt(np.mean(logs**2))
    half = stats.t.ppf((1 + LEVEL) / 2, len(logs)) * deviation / math.sqrt(n)
    tested = [ratio for ratio in ratios if not math.isnan(ratio.low)]
    positives = sum(ratio.low > 1 or ratio.high < 1 for ratio in tested)
    return NoiseFloor(math.exp(-half), math.exp(half), deviation, len(logs), len(tested), positives)
