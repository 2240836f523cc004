"""The claims, each dated by when it was first seen, and a verdict on each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rope_lm.analysis.comparison import Contrast, compare, contrast
from rope_lm.analysis.convergence import holm, judge, t_test, two_one_sided, within
from rope_lm.analysis.runs import Sweep
from rope_lm.refusal import Refusal, unknown

OUTCOMES = ("steps", "seconds", "flops", "final")
RELATIONS = ("above", "within")


@dataclass(frozen=True)
class Verdict:
    """A claim, and what the runs say of it."""

    study: str
    name: str
    claim: dict[str, Any]  # as configs/studies.py writes it, and `since`
    mean: float  # a ratio or, for the final loss, a difference
    low: float
    high: float
    n: int  # pairs of seeds
    p: float  # Student's t test against the threshold, two-sided; of no difference, the larger of two one-sided, twice
    p_holm: float  # corrected over all claims that could be tested
    verdict: str  # supported, refuted, equivalent, inconclusive, not tested
    late: bool  # added, or changed, after its runs began
    unit: str
    bound: str = ""  # as of a Speedup

    @property
    def sentence(self) -> str:
        """What is claimed."""
        c = self.claim
        threshold = f"{c['threshold']:g}"
        words = {
            ("final", "above"): f"ends more than {threshold} {self.unit} below",
            ("final", "within"): f"ends within {threshold} {self.unit} of",
            ("ratio", "above"): f"learns more than {threshold} times as fast as",
            ("ratio", "within"): f"learns as fast, to within {threshold} times, as",
        }["final" if c["outcome"] == "final" else "ratio", c["relation"]]
        words = "learns faster than" if words == "learns more than 1 times as fast as" else words
        by = {"seconds": ", in seconds", "flops": ", in FLOPs"}
        return f"{c['treatment']} {words} {c['baseline']}{by.get(c['outcome'], '')}"


def judge_all(sweeps: Sequence[Sweep]) -> list[Verdict]:
    """A verdict on every claim of the sweeps, corrected (Holm) over those that could be tested.

    Raises Refusal for an outcome or a relation that there is not.
    """
    found = [
        _judge(sweep, setting, name, claim)
        for sweep in sweeps
        for name, claim in sweep.claims.items()
        for setting in [next((each for each in sweep.settings if each.setting == claim["setting"]), None)]
    ]
    tested = [each for each in found if not math.isnan(each.p)]
    adjusted = dict(zip(map(id, tested), holm([each.p for each in tested]), strict=True))
    return [replace(each, p_holm=adjusted.get(id(each), math.nan)) for each in found]


def _judge(sweep: Sweep, setting: Sweep | None, name: str, claim: dict[str, Any]) -> Verdict:
    for key, allowed in (("outcome", OUTCOMES), ("relation", RELATIONS)):
        if claim[key] not in allowed:
            raise unknown(f"{key} of claim {name}", str(claim[key]), allowed)
    began = min((run.began for run in setting.runs if run.began), default="") if setting else ""
    late = bool(began) and began < claim["since"]
    none = math.nan
    made = Verdict(sweep.name, name, claim, none, none, none, 0, none, none, "not tested", late, "nats per token")
    if setting is None or setting.grid:
        return made
    try:
        runs = compare(setting, claim["treatment"])
        arms = {arm.name: arm.run for arm in runs}
        found = contrast(arms[claim["baseline"]], arms[claim["treatment"]])
    except (Refusal, KeyError):
        return made
    return _weigh(replace(made, unit=runs.unit), found)


def _weigh(made: Verdict, found: Contrast) -> Verdict:
    """By the interval of the outcome: ratios on their logarithms, as they are averaged, and differences as they are."""
    outcome, threshold, no_difference = (
        made.claim["outcome"],
        made.claim["threshold"],
        made.claim["relation"] == "within",
    )
    if outcome == "final":
        each, values, at = found.final, found.final.values, threshold
        low, high, verdict = each.low, each.high, judge(each.low, each.high, threshold, each.bound)
    else:
        each = getattr(found.common, outcome) if no_difference else found.judge(outcome, threshold)
        values, at, verdict = each.logs, math.log(threshold), each.verdict
        low, high = math.log(each.low), math.log(each.high)
    # A 95% interval lies within the margin where both one-sided p are below 2.5%: twice the larger is held against 5%.
    p = float(np.minimum(1, 2 * two_one_sided(values, -at, at))) if no_difference else t_test(values, at)
    verdict = within(low, high, -at, at, each.bound) if no_difference else verdict
    measured = {key: getattr(each, key) for key in ("mean", "low", "high", "bound")}
    return replace(made, **measured, n=len(values), p=p, verdict=verdict)
