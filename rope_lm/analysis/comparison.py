"""Arms compared with each other over paired seeds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rope_lm.analysis.estimates import (
    BOUND,
    MARGIN,
    Crossing,
    Effect,
    Estimate,
    NoiseFloor,
    crossing,
    detectable,
    difference,
    holm,
    interval,
    judge,
    noise_floor,
    speedup,
    within,
)
from rope_lm.analysis.runs import Curve, Run, Sweep
from rope_lm.refusal import Refusal


class Costs(NamedTuple):
    """The speed-up to one target, by the cost of reaching it."""

    steps: Effect
    seconds: Effect  # of training, without compilation
    flops: Effect


@dataclass(frozen=True)
class Contrast:
    """The treatment compared with one baseline, over the seeds that both have.

    There are two targets, fixed by a rule in advance. `median` is the baseline's median final validation loss. Half of
    its own seeds do not reach it (they are censored), so the speed-up is a lower bound, which can support a claim but
    not refute it. `common` is the highest final loss of any seed in both arms. Every seed reaches it, so nothing is
    censored there and a claim can be refuted. Seeds that diverged, or whose final loss is not finite, set neither
    target and are censored at both.
    """

    median: Costs
    common: Costs
    final: Effect  # baseline's final loss minus the treatment's, over seeds that reach a finite one in both
    area: Effect  # the same for the mean loss over the run (area under the loss curve)
    curves: tuple[list[Curve], list[Curve]]  # of the seeds that both have: baseline's, treatment's
    targets: list[float]  # of `profile`

    def judge(self, cost: str, threshold: float) -> Effect:
        """Return a verdict on whether the speed-up is above `threshold`, with the speed-up that decided it.

        *Supported* is decided at the median target. *Refuted* is decided there too, or at the common target if the
        median gives only a bound. *Equivalent*, a speed-up within MARGIN of 1, is decided at the common target. So no
        verdict is tested at both targets.
        """
        first, second = getattr(self.median, cost), getattr(self.common, cost)
        verdict = judge(first.low, first.high, threshold, first.bound)
        if verdict != "inconclusive":
            return first._replace(verdict=verdict)
        if first.bound and judge(second.low, second.high, threshold, second.bound) == "refuted":
            return second._replace(verdict="refuted")
        if threshold == 1 and within(second.low, second.high, 1 / MARGIN, MARGIN, second.bound) == "supported":
            return second._replace(verdict="equivalent")
        # If the treatment does not reach the median on every seed, the median shows nothing.
        return (first if first.bound in ("", "lower") else second)._replace(verdict="inconclusive")

    @cached_property
    def steps(self) -> Effect:
        """The speed-up in steps, with the verdict on whether it is above 1."""
        return self.judge("steps", 1.0)

    @cached_property
    def profile(self) -> list[Effect]:
        """The speed-ups in steps to a series of targets, from the highest loss to the lowest."""
        own, other = self.curves
        return [speedup(_crossings(own, target), _crossings(other, target), target) for target in self.targets]

    @property
    def costs(self) -> Costs:
        """The speed-ups to the target of `steps`."""
        return self.common if self.steps.target == self.common.steps.target else self.median

    @property
    def detectable(self) -> float:
        """The smallest speed-up that equally many, equally noisy pairs detect in 80% of studies."""
        logs = self.common.steps.values  # at the median, half of the baseline's seeds are cut off and look less noisy
        return math.exp(detectable(float(np.std(logs, ddof=1)), len(logs))) if len(logs) > 1 else math.nan


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison."""

    run: Run
    final: Estimate  # loss at the end, over seeds
    bits_per_byte: float
    area: float  # mean validation loss over the run
    overhead: float  # seconds per token over those of `none`, minus one; nan without a `none`
    target: float  # the loss that the treatment has to reach, as in Contrast
    steps: float  # of this arm to the target: geometric mean over the seeds that both have
    treated_steps: float  # of the treatment to the same target
    contrast: Contrast | None  # the treatment compared with this arm; None for the treatment itself
    itself: Effect | None  # half of its seeds over the other half (A/A); None for fewer than two
    p_holm: float = math.nan  # p of the speed-up in steps, corrected over the arms

    @property
    def name(self) -> str:
        return self.run.arm

    @property
    def speedup(self) -> Effect | None:
        """The treatment's speed-up over this arm, in steps."""
        return self.contrast.steps if self.contrast else None


@dataclass(frozen=True)
class Comparison:
    """The arms of one setting, lowest final loss first. Iterate over it, or index it by an arm's name."""

    sweep: Sweep  # of the setting
    treatment: str
    arms: list[Arm]
    unit: str  # of every loss: "nats per token", or "bits per byte" if the tokenizers differ
    floor: NoiseFloor

    def __iter__(self) -> Iterator[Arm]:
        return iter(self.arms)

    def __getitem__(self, name: str) -> Arm:
        return {arm.name: arm for arm in self.arms}[name]

    @property
    def tested(self) -> list[tuple[Arm, Contrast]]:
        """The arms that the treatment was compared with, each with its contrast."""
        return [(arm, arm.contrast) for arm in self.arms if arm.contrast]

    @property
    def pairs(self) -> int:
        """The largest number of seed pairs in any of the contrasts."""
        return max((contrast.steps.n for _, contrast in self.tested), default=0)


def compare(sweep: Sweep, treatment: str) -> Comparison:
    """Return the arms of one setting that finished, each with the speed-up of the arm `treatment` over it.

    Losses are in nats per token or, if the arms' tokenizers differ, in bits per byte. Raises Refusal for a sweep of
    several settings or learning rates, and for arms with different objectives, whose losses cannot be compared.
    """
    if sweep.grid:
        raise Refusal(f"{sweep.title} is a grid of learning rates: compare(sweep.at({{arm: rate, ...}}), ...)")
    if len(sweep.settings) > 1:
        names = ", ".join(setting.setting or "(none)" for setting in sweep.settings)
        raise Refusal(f"{sweep.name} has settings ({names}), and arms are compared within one: choose one of them")
    runs = [run for run in sweep.runs if run.finished and run.curves]
    if len({run.objective for run in runs}) > 1:
        shown = ", ".join(f"{run.arm}: {run.objective}" for run in runs)
        raise Refusal(f"the arms of {sweep.title} have different objectives ({shown}): their losses cannot be compared")
    unit = "nats per token"
    if len({str(run.manifest["data"]["fingerprint"].get("tokenizer")) for run in runs}) > 1:
        unit, runs = "bits per byte", [run.in_bits() for run in runs]
    treated = next((run for run in runs if run.arm == treatment), None)
    plain = next((run for run in runs if run.encoding == "none"), None)
    arms = [_arm(run, treated, plain, unit) for run in runs]
    speedups = {arm.name: arm.contrast.steps for arm in arms if arm.contrast}
    corrected = dict(zip(speedups, holm([found.p for found in speedups.values()]), strict=True))
    arms = sorted(
        (replace(arm, p_holm=corrected.get(arm.name, math.nan)) for arm in arms), key=lambda arm: arm.final.mean
    )
    pairs = max((found.n for found in speedups.values()), default=0)
    return Comparison(sweep, treatment, arms, unit, noise_floor([arm.itself for arm in arms if arm.itself], pairs))


def _arm(run: Run, treated: Run | None, plain: Run | None, unit: str) -> Arm:
    finals = [curve.final for curve in run.curves]
    own, other = run.curves, run.curves
    found, target = None, float(np.median(finals))
    if treated and treated is not run and paired(run, treated):
        found = contrast(run, treated)
        (own, other), target = _sides(_pairs(run, treated)), found.steps.target
    return Arm(
        run=run,
        final=interval(finals),
        bits_per_byte=float(np.mean(finals)) * (1.0 if unit == "bits per byte" else run.bits_per_nat),
        area=float(np.mean([curve.area for curve in run.curves])),
        overhead=plain.tokens_per_second / run.tokens_per_second - 1 if plain else math.nan,
        target=target,
        steps=_geometric(_crossings(own, target)),
        treated_steps=_geometric(_crossings(other, target)),
        contrast=found,
        itself=_itself(run),
    )


def contrast(baseline: Run, treatment: Run) -> Contrast:
    """Return the treatment compared with the baseline, over the seeds that both have.

    Raises Refusal if no seed ends at a finite loss in both.
    """
    if not (finite := paired(baseline, treatment)):
        raise Refusal(
            f"{baseline.arm} and {treatment.arm} have no seed that reaches a finite loss in both: train them on the "
            "same seeds, at learning rates at which they do not diverge"
        )
    own, other = _sides(_pairs(baseline, treatment))
    ends = _sides(finite)
    own_lost, other_lost = (any(not math.isfinite(curve.final) for curve in side) for side in (own, other))
    bound = BOUND[own_lost, other_lost]
    # Seconds are those of a whole ensemble, so ensembles of different sizes cannot be compared in seconds.
    timed = len(baseline.manifest["members"]) == len(treatment.manifest["members"])
    median = float(np.median([curve.final for curve in baseline.curves]))
    flops = [run.manifest.get("flops_per_token", math.nan) * run.tokens_per_step for run in (baseline, treatment)]

    def to(target: float) -> Costs:
        at = _crossings(own, target), _crossings(other, target)
        seconds = speedup(_seconds(own, at[0]), _seconds(other, at[1]), target)
        return Costs(
            steps=speedup(*at, target),
            seconds=seconds if timed else seconds._replace(bound="unknown", verdict="inconclusive"),
            flops=speedup(_times(at[0], flops[0]), _times(at[1], flops[1]), target),
        )

    return Contrast(
        median=to(median),
        common=to(_common(*ends)),
        final=difference(*([curve.final for curve in side] for side in ends))._replace(bound=bound),
        area=difference(*([curve.area for curve in side] for side in ends))._replace(bound=bound),
        curves=(own, other),
        targets=_targets(baseline, median),
    )


def paired(baseline: Run, treatment: Run) -> list[tuple[Curve, Curve]]:
    """Return the pair of curves of each seed that ends at a finite loss in both runs."""
    pairs = _pairs(baseline, treatment)
    return [(own, other) for own, other in pairs if math.isfinite(own.final) and math.isfinite(other.final)]


def _pairs(baseline: Run, treatment: Run) -> list[tuple[Curve, Curve]]:
    """Return the pair of curves of each seed that both runs have."""
    treated = {curve.seed: curve for curve in treatment.members.values()}
    return [(curve, treated[curve.seed]) for curve in baseline.members.values() if curve.seed in treated]


def _sides(pairs: Sequence[tuple[Curve, Curve]]) -> tuple[list[Curve], list[Curve]]:
    return [own for own, _ in pairs], [other for _, other in pairs]


def _itself(run: Run) -> Effect | None:
    """Return the speed-up of the second half of a run's seeds over the first half, in pairs. Its true value is 1."""
    half = len(run.curves) // 2
    if not half:
        return None
    curves = sorted(run.curves, key=lambda curve: curve.seed)
    sides = curves[:half], curves[half : 2 * half]
    target = _common(*sides)
    return speedup(_crossings(sides[0], target), _crossings(sides[1], target), target)


def _common(baseline: Sequence[Curve], treatment: Sequence[Curve]) -> float:
    """Return the loss that all these curves reach: the highest of their final ones."""
    return max(curve.final for curve in (*baseline, *treatment))


def _crossings(curves: Sequence[Curve], target: float) -> list[Crossing]:
    return [crossing(curve.steps, curve.nats, target) for curve in curves]


def _seconds(curves: Sequence[Curve], crossings: Sequence[Crossing]) -> list[Crossing]:
    """Return the same crossings in seconds of training."""
    # At step 0 no time has passed: a thousandth of a second keeps the ratio finite.
    return [
        Crossing(max(float(np.interp(at.steps, curve.steps, curve.seconds)), 1e-3), at.censored)
        for curve, at in zip(curves, crossings, strict=True)
    ]


def _times(crossings: Sequence[Crossing], factor: float) -> list[Crossing]:
    return [Crossing(at.steps * factor, at.censored) for at in crossings]


def _geometric(crossings: Sequence[Crossing]) -> float:
    return float(np.exp(np.mean([math.log(at.steps) for at in crossings])))


def _targets(run: Run, final: float) -> list[float]:
    """Return targets evenly spaced in nats, from the loss after a twentieth of the steps to the median final loss."""
    early = np.nanmean([np.interp(0.05 * run.steps, curve.steps, curve.nats) for curve in run.curves])
    return np.linspace(early, final, 25).tolist()
