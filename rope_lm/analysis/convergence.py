"""How much faster one arm reaches a loss than another, and how sure that is. The rules of the protocol, in numbers.

Seeds are paired: a seed fixes initial values and data order in every arm, so what is averaged is the log ratio within
a seed. Intervals are Student's t on the logs: at five seeds percentile and BCa bootstraps cover 85%, t covers 97.7%.
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
MARGIN = 1.1  # speed-ups between 1/1.1 and 1.1 are called equivalent: the smallest published are "10-20%"
# Of the baseline over the treatment, by which of the two is only known to be at least what was counted.
BOUND = {(False, False): "", (True, False): "lower", (False, True): "upper", (True, True): "unknown"}
Values = Sequence[float] | np.ndarray


class Estimate(NamedTuple):
    """A mean and its 95% interval; the ends are nan where there are fewer than two values, or all are alike."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """By how much the baseline's value lies above the treatment's: the mean over pairs of seeds."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, exact sign-flip
    values: tuple[float, ...]  # one for each pair
    bound: str = ""  # as of a Speedup, where pairs of which one came to no loss are left out


class Crossing(NamedTuple):
    """When a curve first reaches a target."""

    steps: float  # the last step of the curve, where it never does
    censored: bool  # whether it never does


class Speedup(NamedTuple):
    """How many times fewer steps (seconds, FLOPs) the treatment takes than the baseline: geometric mean over seeds."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, exact sign-flip
    n: int  # pairs of seeds
    target: float  # of the validation loss
    bound: str  # "" where every pair crosses; "lower", "upper" or "unknown" where censoring makes it a bound
    verdict: str  # supported, refuted, inconclusive; of a contrast also equivalent
    logs: tuple[float, ...]  # the log ratio of each pair


def crossing(steps: np.ndarray, nats: np.ndarray, target: float) -> Crossing:
    """The first time that a curve is at or below `target`, interpolated in log-steps between finite evaluations."""
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
    """Mean and Student's t interval; none for values that are all alike, which say nothing of how they spread."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else math.nan
    if not _spread(values):
        return Estimate(mean, math.nan, math.nan)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def _spread(values: Values) -> bool:
    """Whether there are two values or more that differ by more than rounding."""
    return len(values) > 1 and bool(np.ptp(values) > 1e-12 * np.max(np.abs(values)))


def sign_flip(values: Values) -> float:
    """Two-sided p of the mean under all 2^n changes of sign (exact). It cannot be below 2^(1-n), nor, corrected over k
    comparisons, below k times that: at 0.05 one comparison needs six pairs or more, each of four or five needs eight.
    Beyond 16 pairs 2^16 random changes stand for all. nan where a value is, and for no values."""
    values = np.asarray(values, float)
    if not len(values) or np.isnan(values).any():
        return math.nan
    means = np.abs(_signs(len(values)) @ values)
    return float(np.mean(means >= means[0] * (1 - 1e-12)))


@cache
def _signs(n: int) -> np.ndarray:
    """[2^n n], the first row all 1."""
    if n <= 16:
        return np.array(list(itertools.product([1, -1], repeat=n)))
    signs = np.random.default_rng(0).choice([1, -1], size=(2**16, n))
    signs[0] = 1
    return signs


def least_pairs(comparisons: int) -> int:
    """The fewest pairs whose sign-flip p, corrected over so many comparisons, can be below 0.05."""
    return math.floor(math.log2(comparisons / (1 - LEVEL))) + 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = np.argsort(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def difference(baseline: Values, treatment: Values) -> Difference:
    """The baseline's paired values less the treatment's."""
    values = np.subtract(baseline, treatment)
    return Difference(*interval(values), sign_flip(values), tuple(values.tolist()))


def speedup(baseline: Sequence[Crossing], treatment: Sequence[Crossing], target: float) -> Speedup:
    """The treatment's speed-up over the baseline from paired crossings of one target.

    A censored baseline makes a pair's ratio a lower bound, which is conservative; a censored treatment makes it an
    upper bound, which supports nothing; both, and nothing is known of the pair.
    """
    logs = [math.log(b.steps / t.steps) for b, t in zip(baseline, treatment, strict=True)]
    kinds = {BOUND[b.censored, t.censored] for b, t in zip(baseline, treatment, strict=True)} - {""}
    bound = "" if not kinds else kinds.pop() if len(kinds) == 1 else "unknown"
    mean, low, high = (math.exp(value) for value in interval(logs))
    verdict = judge(low, high, 1.0, bound)
    return Speedup(mean, low, high, sign_flip(logs), len(logs), target, bound, verdict, tuple(logs))


def judge(low: float, high: float, threshold: float, bound: str) -> str:
    """Whether a value lies above `threshold`, by its interval: supported, refuted or inconclusive.

    A value that censoring makes a lower bound can support and not refute; an upper bound, the other way about.
    """
    if low > threshold and bound in ("", "lower"):
        return "supported"
    if high < threshold and bound in ("", "upper"):
        return "refuted"
    return "inconclusive"


def within(low: float, high: float, least: float, most: float, bound: str) -> str:
    """Whether a value lies between `least` and `most`: supported where its whole interval does (two one-sided tests at
    2.5% each), refuted where none of it does, else inconclusive."""
    if least < low and high < most and bound == "":
        return "supported"
    if "supported" in (judge(low, high, most, bound), judge(-high, -low, -least, _REVERSED[bound])):
        return "refuted"
    return "inconclusive"


_REVERSED = {"": "", "lower": "upper", "upper": "lower", "unknown": "unknown"}


def t_test(values: Values, at: float) -> float:
    """Two-sided p of Student's t test that the mean is `at`; nan where there is no interval."""
    return float(stats.ttest_1samp(values, at).pvalue) if _spread(values) else math.nan


def two_one_sided(values: Values, least: float, most: float) -> float:
    """p of the hypothesis that the mean lies outside (least, most): the larger of two one-sided t tests (Schuirmann
    1987); nan where there is no interval."""
    if not _spread(values):
        return math.nan
    above = stats.ttest_1samp(values, least, alternative="greater").pvalue
    return float(max(above, stats.ttest_1samp(values, most, alternative="less").pvalue))


def detectable(deviation: float, n: int) -> float:
    """The smallest mean of `n` paired values that a two-sided t test at 5% finds in 80% of studies, given the standard
    deviation of the values; nan for fewer than two."""
    if n < 2 or not deviation > 0:
        return math.nan
    edge = stats.t.ppf((1 + LEVEL) / 2, n - 1)

    # Chances of a verdict in the right direction: noncentral t.
    lack = lambda shift: stats.nct.sf(edge, n - 1, shift) - POWER  # noqa: E731
    return deviation * optimize.brentq(lack, 0.1, 30.0) / math.sqrt(n)


class Floor(NamedTuple):
    """What arms against themselves give, on seeds that are not the same (A/A): the noise of a speed-up."""

    low: float  # of a speed-up that is none, from as many pairs as the comparison has: 95% of them lie in here
    high: float
    deviation: float  # of a log ratio of two seeds
    pairs: int  # over all arms
    tested: int  # arms with an interval, which can have a verdict
    positives: int  # of those, found faster or slower than themselves: false ones


def floor(ratios: Sequence[Speedup], n: int) -> Floor:
    """The noise floor at `n` pairs, from the speed-ups of arms over themselves, pooled. Their log ratios have mean zero
    by construction, so each counts as a degree of freedom."""
    logs = np.array([log for each in ratios for log in each.logs])
    if not len(logs) or not n:
        return Floor(math.nan, math.nan, math.nan, len(logs), 0, 0)
    deviation = math.sqrt(np.mean(logs**2))
    half = stats.t.ppf((1 + LEVEL) / 2, len(logs)) * deviation / math.sqrt(n)
    tested = [each for each in ratios if not math.isnan(each.low)]
    positives = sum(each.low > 1 or each.high < 1 for each in tested)
    return Floor(math.exp(-half), math.exp(half), deviation, len(logs), len(tested), positives)
