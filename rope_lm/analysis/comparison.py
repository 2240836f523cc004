"""What a sweep says: arms against each other over paired seeds, and the grid that their rates were tuned on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from rope_lm.analysis.convergence import (
    BOUND,
    MARGIN,
    Crossing,
    Difference,
    Estimate,
    Floor,
    Speedup,
    crossing,
    detectable,
    difference,
    floor,
    holm,
    interval,
    judge,
    speedup,
    within,
)
from rope_lm.analysis.runs import Curve, Run, Sweep
from rope_lm.refusal import Refusal


class Costs(NamedTuple):
    """The speed-up to one target, in each of what it may cost to get there."""

    steps: Speedup
    seconds: Speedup  # of training, compiling left out
    flops: Speedup


@dataclass(frozen=True)
class Contrast:
    """The treatment against one baseline, over the seeds that both have.

    There are two targets, fixed by a rule before looking. `median` is the baseline's median final validation loss: half
    of its own seeds do not come to it, and so what it gives is a lower bound, which can support a claim but not refute
    it. `common` is the loss that every seed of both arms comes to, where nothing is censored: it decides what the first
    cannot. Seeds that diverged, or end at no finite loss, fix neither, and are censored at both.
    """

    median: Costs
    common: Costs
    final: Difference  # the baseline's final loss less the treatment's, of the seeds that come to one in both
    area: Difference  # the same of the mean loss over the run (the area under the loss curve)
    profile: list[Speedup]  # in steps, over looser and looser targets, the loosest first

    def judge(self, cost: str, threshold: float) -> Speedup:
        """The speed-up that decides whether it lies above `threshold`, with that verdict.

        *Supported* is decided at the median target, *refuted* at the common one where the median's is a bound, and so
        is *equivalent* (to one, within MARGIN): each has one look at the data.
        """
        first, second = getattr(self.median, cost), getattr(self.common, cost)
        verdict = judge(first.low, first.high, threshold, first.bound)
        if verdict != "inconclusive":
            return first._replace(verdict=verdict)
        if first.bound and judge(second.low, second.high, threshold, second.bound) == "refuted":
            return second._replace(verdict="refuted")
        if threshold == 1 and within(second.low, second.high, 1 / MARGIN, MARGIN, second.bound) == "supported":
            return second._replace(verdict="equivalent")
        # Where the treatment does not come to the median on every seed, nothing at all can be said there.
        return (first if first.bound in ("", "lower") else second)._replace(verdict="inconclusive")

    @cached_property
    def steps(self) -> Speedup:
        """How much faster, in steps, with the verdict on whether it is."""
        return self.judge("steps", 1.0)

    @property
    def costs(self) -> Costs:
        """The speed-ups to the target of `steps`."""
        return self.common if self.steps.target == self.common.steps.target else self.median

    @property
    def detectable(self) -> float:
        """The smallest speed-up that as many pairs, as noisy as these, find in 80% of studies."""
        logs = self.common.steps.logs  # at the median half of the baseline's seeds are cut off: they look less noisy
        return math.exp(detectable(float(np.std(logs, ddof=1)), len(logs))) if len(logs) > 1 else math.nan


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison, and what the treatment does against it (None for the treatment itself)."""

    run: Run
    final: Estimate  # of the loss at the end, over seeds
    bits_per_byte: float
    area: float  # mean validation loss over the run
    overhead: float  # seconds a token over those of `none`, less one; nan where there is no `none`
    target: float  # what the treatment has to reach, as in Contrast
    steps: float  # of this arm to the target: geometric mean over the seeds that both have
    treated_steps: float  # of the treatment to the same target
    contrast: Contrast | None
    itself: Speedup | None  # half of its seeds over the other half (A/A); None for fewer than two
    p_holm: float  # of the speed-up in steps, corrected over the arms

    @property
    def name(self) -> str:
        return self.run.arm

    @property
    def speedup(self) -> Speedup | None:
        """The treatment's, in steps."""
        return self.contrast.steps if self.contrast else None


@dataclass(frozen=True)
class Comparison:
    """The arms of one setting, best final loss first: iterate over it, or take one by its name."""

    sweep: Sweep  # of the setting
    treatment: str
    arms: list[Arm]
    unit: str  # of every loss: "nats per token", or "bits per byte" where the tokenizers differ
    floor: Floor  # the noise of a speed-up that is none

    def __iter__(self) -> Iterator[Arm]:
        return iter(self.arms)

    def __getitem__(self, name: str) -> Arm:
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    @property
    def tested(self) -> list[Arm]:
        """The arms that the treatment was held against."""
        return [arm for arm in self.arms if arm.contrast]


def compare(sweep: Sweep, treatment: str) -> Comparison:
    """The arms of one setting that finished, each with the speed-up of the arm `treatment` over it.

    Losses are in nats per token or, where the arms' tokenizers differ, in bits per byte. Raises Refusal for a sweep of
    several settings or of several learning rates, and for arms of different objectives: their losses are not alike.
    """
    if sweep.grid:
        raise Refusal(f"{sweep.title} is a grid of learning rates: compare(sweep.at({{arm: rate, ...}}), ...)")
    if len(sweep.settings) > 1:
        names = ", ".join(each.setting or "(none)" for each in sweep.settings)
        raise Refusal(f"{sweep.name} has settings ({names}), which are compared within themselves: take one")
    runs = [run for run in sweep.runs if run.finished and run.curves]
    objectives = {run.arm: run.objective for run in runs}
    if len(set(objectives.values())) > 1:
        shown = ", ".join(f"{arm}: {objective}" for arm, objective in objectives.items())
        raise Refusal(f"the arms of {sweep.title} have different objectives ({shown}): losses that do not compare")
    unit, runs = _one_unit(runs)
    treated = next((run for run in runs if run.arm == treatment), None)
    plain = next((run for run in runs if run.encoding == "none"), None)
    arms = [_arm(run, treated, plain, unit) for run in runs]
    tested = [arm for arm in arms if arm.contrast]
    adjusted = dict(zip((arm.name for arm in tested), holm([arm.speedup.p for arm in tested]), strict=True))
    arms = [replace(arm, p_holm=adjusted.get(arm.name, math.nan)) for arm in arms]
    pairs = max((arm.speedup.n for arm in tested), default=0)
    noise = floor([arm.itself for arm in arms if arm.itself], pairs)
    return Comparison(sweep, treatment, sorted(arms, key=lambda arm: arm.final.mean), unit, noise)


def _one_unit(runs: list[Run]) -> tuple[str, list[Run]]:
    """Nats per token of one tokenizer cannot be held against those of another: then bits per byte."""
    if len({str(run.manifest["data"]["fingerprint"].get("tokenizer")) for run in runs}) <= 1:
        return "nats per token", runs
    return "bits per byte", [run.in_bits() for run in runs]


def _arm(run: Run, treated: Run | None, plain: Run | None, unit: str) -> Arm:
    finals = [curve.final for curve in run.curves]
    bits = 1.0 if unit == "bits per byte" else run.bits_per_nat
    pairs = _pairs(run, treated) if treated and treated is not run else []
    found = contrast(run, treated) if any(map(_whole, pairs)) else None
    target = found.steps.target if found else float(np.median(finals))
    own, other = zip(*pairs, strict=True) if found else (run.curves, run.curves)
    return Arm(
        run=run,
        final=interval(finals),
        bits_per_byte=bits * float(np.mean(finals)),
        area=float(np.mean([curve.area for curve in run.curves])),
        overhead=plain.tokens_per_second / run.tokens_per_second - 1 if plain else math.nan,
        target=target,
        steps=_geometric(_crossings(own, target)),
        treated_steps=_geometric(_crossings(other, target)),
        contrast=found,
        itself=_itself(run),
        p_holm=math.nan,
    )


def contrast(baseline: Run, treated: Run) -> Contrast:
    """The treatment against the baseline, over the seeds that both have. Raises Refusal where none of them comes to a
    finite loss in both."""
    pairs = _pairs(baseline, treated)
    whole = list(filter(_whole, pairs))
    if not whole:
        raise Refusal(
            f"{baseline.arm} and {treated.arm} have no seed that comes to a finite loss in both: train them on "
            "the same seeds, at rates at which they do not diverge"
        )
    own, other = ([pair[side] for pair in pairs] for side in (0, 1))
    ends = [[pair[side] for pair in whole] for side in (0, 1)]
    bound = BOUND[tuple(any(not math.isfinite(curve.final) for curve in side) for side in (own, other))]
    # Seconds are of a whole ensemble: those of one with more members are not held against those of one with fewer.
    timed = len(baseline.manifest["members"]) == len(treated.manifest["members"])
    median = float(np.median([curve.final for curve in baseline.curves]))
    flops = [run.manifest.get("flops_per_token", math.nan) * run.tokens_per_step for run in (baseline, treated)]

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
        profile=[
            speedup(_crossings(own, each), _crossings(other, each), each)
            for each in _targets(baseline, median).tolist()
        ],
    )


def _itself(run: Run) -> Speedup | None:
    """The first half of its seeds over the second, in pairs: a speed-up that is none."""
    half = len(run.curves) // 2
    if not half:
        return None
    curves = sorted(run.curves, key=lambda curve: curve.seed)
    sides = curves[:half], curves[half : 2 * half]
    target = _common(*sides)
    return speedup(*(_crossings(side, target) for side in sides), target)


def _common(baseline: Sequence[Curve], treated: Sequence[Curve]) -> float:
    """The loss that all these curves come to: the highest of their final ones."""
    return max(curve.final for curve in (*baseline, *treated))


def _pairs(baseline: Run, treated: Run) -> list[tuple[Curve, Curve]]:
    """The curves of the seeds that both have."""
    mine = {curve.seed: curve for curve in treated.members.values()}
    return [(curve, mine[curve.seed]) for curve in baseline.members.values() if curve.seed in mine]


def _whole(pair: tuple[Curve, Curve]) -> bool:
    """Whether both come to a finite loss."""
    return all(math.isfinite(curve.final) for curve in pair)


def _crossings(curves: Sequence[Curve], target: float) -> list[Crossing]:
    return [crossing(curve.steps, curve.nats, target) for curve in curves]


def _seconds(curves: Sequence[Curve], crossings: Sequence[Crossing]) -> list[Crossing]:
    """The same crossings, in seconds of training."""
    # At step 0 no time has passed: a thousandth of a second keeps the ratio a number.
    return [
        Crossing(max(float(np.interp(at.steps, curve.steps, curve.seconds)), 1e-3), at.censored)
        for curve, at in zip(curves, crossings, strict=True)
    ]


def _times(crossings: Sequence[Crossing], factor: float) -> list[Crossing]:
    return [Crossing(each.steps * factor, each.censored) for each in crossings]


def _geometric(crossings: Sequence[Crossing]) -> float:
    return float(np.exp(np.mean([math.log(each.steps) for each in crossings])))


def _targets(run: Run, final: float) -> np.ndarray:
    """From what the arm reaches after a twentieth of its steps down to its median final loss, evenly in nats."""
    early = np.nanmean([np.interp(0.05 * run.steps, curve.steps, curve.nats) for curve in run.curves])
    return np.linspace(early, final, 25)


@dataclass(frozen=True)
class Tuning:
    """One arm of a grid: its final loss at every rate."""

    arm: str
    rates: list[float]
    finals: list[float]  # nats per token, mean over the tuning seeds; inf where a member came to no finite loss
    seeds: int
    setting: str = ""

    @property
    def best(self) -> float:
        """The rate of the lowest loss; nan where there is none at any."""
        return self.rates[int(np.argmin(self.finals))] if math.isfinite(min(self.finals)) else math.nan

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest: a wider grid might hold a better one."""
        return len(self.rates) > 1 and self.best in (self.rates[0], self.rates[-1])

    def loss_of(self, rate: float) -> float:
        """Nats per token that the arm loses at `rate` against its best; nan for a rate that is not on the grid."""
        near = [final for each, final in zip(self.rates, self.finals, strict=True) if math.isclose(each, rate)]
        return near[0] - min(self.finals) if near else math.nan


def tune(sweep: Sweep) -> list[Tuning]:
    """What a grid says of each arm that finished, setting by setting."""
    made = [_archived(row, sweep) for row in sweep.archive.get("tuning", [])]
    for setting in sweep.settings:
        for run in (run for run in setting.runs if run.finished):
            finals = []
            for rate in run.rates:
                members, curves = run.at(rate).manifest["members"], run.at(rate).curves
                # A rate at which a member came to nothing is no rate to choose.
                finals.append(float(np.mean([c.final for c in curves])) if len(curves) == len(members) else math.inf)
            seeds = len({member["seed"] for member in run.manifest["members"]})
            made.append(Tuning(run.arm, run.rates, finals, seeds, setting.setting))
    return made


def _archived(row: dict[str, Any], sweep: Sweep) -> Tuning:
    try:
        finals = [math.inf if final is None else float(final) for final in row["final_nats"]]
        rates = [float(rate) for rate in row["rates"]]
        return Tuning(row["arm"], rates, finals, int(row["seeds"]), row.get("setting", ""))
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{sweep.path / 'summary.json'} is not a report's ({error}): it is damaged") from error


@dataclass(frozen=True)
class Sensitivity:
    """How the treatment's speed-up over one baseline hangs on the learning rate. From tuning seeds: no comparison."""

    baseline: str
    rates: list[float]
    shared: list[Speedup | None]  # both at one rate; None where no pair of members is finite
    tuned: Speedup | None  # each at its own best


def sensitivity(sweep: Sweep, treatment: str) -> list[Sensitivity]:
    """Of one setting of a grid: for each baseline, the treatment's speed-up at every shared rate, and at each arm's own
    best rate."""
    best = {tuning.arm: tuning.best for tuning in tune(sweep)}
    runs = {run.arm: run for run in sweep.runs if run.arm in best}
    if treatment not in runs:
        return []
    made = []
    for name in (name for name in runs if name != treatment):
        shared = sorted(set(runs[name].rates) & set(runs[treatment].rates))
        pairs = [(rate, rate) for rate in shared] + [(best[name], best[treatment])]
        found = [_speedup(runs[name].at(mine), runs[treatment].at(other)) for mine, other in pairs]
        made.append(Sensitivity(name, shared, found[:-1], found[-1]))
    return made


def _speedup(baseline: Run, treated: Run) -> Speedup | None:
    return contrast(baseline, treated).steps if any(map(_whole, _pairs(baseline, treated))) else None
