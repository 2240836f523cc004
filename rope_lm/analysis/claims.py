"""The claims that were written before the runs, and a verdict on each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    p: float  # Student's t test against the threshold, two-sided; two one-sided ones where no difference is claimed
    p_holm: float  # corrected over all claims that could be tested
    verdict: str  # supported, refuted, equivalent, inconclusive, not tested
    late: bool  # added, or changed, after its runs began
    unit: str

    @property
    def sentence(self) -> str:
        """What is claimed."""
        c, of = self.claim, {"final": "ends"}.get(self.claim["outcome"], "learns")
        if c["outcome"] == "final":
            by = f"{c['threshold']:g} {self.unit}"
            how = f"within {by} of" if c["relation"] == "within" else f"more than {by} below"
        else:
            how = f"as fast (within {c['threshold']:g} times)" if c["relation"] == "within" else "faster"
            how += f", by more than {c['threshold']:g} times," if c["threshold"] != 1 and "faster" in how else ""
            how += {"steps": "", "seconds": " in seconds", "flops": " in FLOPs"}[c["outcome"]]
            how += " as" if c["relation"] == "within" else " than"
        return f"{c['treatment']} {of} {how} {c['baseline']}"


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
    outcome, threshold = made.claim["outcome"], made.claim["threshold"]
    each, scale = (found.final, float) if outcome == "final" else (getattr(found, outcome), math.log)
    values, bound = (each.values, "") if outcome == "final" else (each.logs, each.bound)
    low, high, at = scale(each.low), scale(each.high), scale(threshold)
    if made.claim["relation"] == "within":
        p, verdict = two_one_sided(values, -at, at), within(low, high, -at, at, bound)
    else:
        p, verdict = t_test(values, at), judge(low, high, at, bound)
        if outcome != "final" and threshold == 1:
            verdict = each.verdict  # which may be "equivalent"
    return replace(made, mean=each.mean, low=each.low, high=each.high, n=len(values), p=p, verdict=verdict)
