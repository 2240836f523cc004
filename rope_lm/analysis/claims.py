"""Verdicts on claims. Each claim is dated by when it was first recorded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rope_lm.analysis.comparison import Contrast, compare, contrast
from rope_lm.analysis.estimates import holm, judge, t_test, two_one_sided, within
from rope_lm.analysis.runs import Sweep
from rope_lm.refusal import Refusal, unknown

OUTCOMES = ("steps", "seconds", "flops", "final")
RELATIONS = ("above", "within")


@dataclass(frozen=True)
class Verdict:
    """A claim and the evidence on it. The numbers are nan if the claim could not be tested."""

    study: str
    name: str
    claim: dict[str, Any]  # as in configs/studies.py, and `since`
    late: bool  # added or changed after its runs began
    mean: float = math.nan  # a ratio or, for the final loss, a difference
    low: float = math.nan
    high: float = math.nan
    bound: str = ""  # as in Effect
    n: int = 0  # pairs of seeds
    p: float = math.nan  # two-sided t test against the threshold; for no difference, twice the larger one-sided p
    p_holm: float = math.nan  # corrected over all claims that could be tested
    verdict: str = "not tested"  # supported, refuted, equivalent, inconclusive, not tested
    unit: str = "nats per token"

    @property
    def sentence(self) -> str:
        """The claim in words."""
        c = self.claim
        threshold, final = f"{c['threshold']:g}", c["outcome"] == "final"
        words = {
            (True, "above"): f"ends more than {threshold} {self.unit} below",
            (True, "within"): f"ends within {threshold} {self.unit} of",
            (False, "above"): f"learns more than {threshold} times as fast as"
            if threshold != "1"
            else "learns faster than",
            (False, "within"): f"learns as fast, to within {threshold} times, as",
        }[final, c["relation"]]
        cost = {"seconds": ", in seconds", "flops": ", in FLOPs"}.get(c["outcome"], "")
        return f"{c['treatment']} {words} {c['baseline']}{cost}"


def judge_all(sweeps: Sequence[Sweep]) -> list[Verdict]:
    """Return a verdict on every claim of the sweeps, with p corrected (Holm) over those that could be tested.

    Raises Refusal for an unknown outcome or relation.
    """
    verdicts = [_judge(sweep, name, claim) for sweep in sweeps for name, claim in sweep.claims.items()]
    corrected = iter(holm([verdict.p for verdict in verdicts if not math.isnan(verdict.p)]))
    return [v if math.isnan(v.p) else replace(v, p_holm=next(corrected)) for v in verdicts]


def _judge(sweep: Sweep, name: str, claim: dict[str, Any]) -> Verdict:
    for key, allowed in (("outcome", OUTCOMES), ("relation", RELATIONS)):
        if claim[key] not in allowed:
            raise unknown(f"{key} of claim {name}", str(claim[key]), allowed)
    setting = next((setting for setting in sweep.settings if setting.setting == claim["setting"]), None)
    began = min((run.began for run in setting.runs if run.began), default="") if setting else ""
    untested = Verdict(sweep.name, name, claim, late=bool(began) and began < claim["since"])
    if setting is None or setting.grid:
        return untested
    try:
        arms = compare(setting, claim["treatment"])
        found = contrast(arms[claim["baseline"]].run, arms[claim["treatment"]].run)
    except (Refusal, KeyError):
        return untested
    return _test(replace(untested, unit=arms.unit), found)


def _test(verdict: Verdict, found: Contrast) -> Verdict:
    """Return the verdict that the outcome's interval supports. Ratios are judged on a log scale."""
    outcome, threshold, relation = (verdict.claim[key] for key in ("outcome", "threshold", "relation"))
    scale: Callable[[float], float] = float if outcome == "final" else math.log
    if outcome == "final":
        effect = found.final
    else:
        effect = getattr(found.common, outcome) if relation == "within" else found.judge(outcome, threshold)
    at, low, high = map(scale, (threshold, effect.low, effect.high))
    decision, p = effect.verdict or judge(low, high, at, effect.bound), t_test(effect.values, at)
    if relation == "within":
        decision = within(low, high, -at, at, effect.bound)
        # The 95% interval lies within the margin if both one-sided p are below 2.5%: twice the larger is below 5%.
        p = float(np.minimum(1, 2 * two_one_sided(effect.values, -at, at)))
    interval = {key: getattr(effect, key) for key in ("mean", "low", "high", "bound", "n")}
    return replace(verdict, **interval, p=p, verdict=decision)
