"""What a sweep says: arms against each other over paired seeds, and the grid that their rates were tuned on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rope_lm.analysis.convergence import Crossing, Estimate, Speedup, crossing, holm, interval, speedup
from rope_lm.analysis.runs import Curve, Run, Sweep
from rope_lm.refusal import Refusal

# Of a manifest, equal in fair arms.
FACTS = ("commit", "diff", "kernel", "precision", "device", "versions", "deterministic", "batches")


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison, and the treatment's speed-up over it (None for the treatment itself)."""

    run: Run
    final: Estimate  # nats per token at the end, over seeds
    bits_per_byte: float
    area: float  # mean validation loss over the run, nats per token
    overhead: float  # seconds a token over those of `none`, less one; nan where there is no `none`
    target: float  # median final loss of this arm: what the treatment has to reach
    steps: float  # of this arm to the target: geometric mean over the seeds that both have
    treated_steps: float  # of the treatment to the same target
    speedup: Speedup | None
    p_holm: float
    profile: list[Speedup]  # over looser and looser targets, the loosest first
    seconds_speedup: float  # the same ratio in seconds of training

    @property
    def name(self) -> str:
        return self.run.arm


def compare(sweep: Sweep, treatment: str) -> list[Arm]:
    """The arms that finished, best final loss first, each with the speed-up of the arm `treatment` over it.

    The target is fixed by a rule before looking: the baseline's median final validation loss.
    """
    runs = [run for run in sweep.runs if run.finished and run.curves]
    treated = next((run for run in runs if run.arm == treatment), None)
    plain = next((run for run in runs if run.encoding == "none"), None)
    made = [_arm(run, treated, plain) for run in runs]
    tested = [arm for arm in made if arm.speedup]
    adjusted = dict(zip((arm.name for arm in tested), holm([arm.speedup.p for arm in tested]), strict=True))
    made = [Arm(**{**vars(arm), "p_holm": adjusted.get(arm.name, math.nan)}) for arm in made]
    return sorted(made, key=lambda arm: arm.final.mean)


def _arm(run: Run, treated: Run | None, plain: Run | None) -> Arm:
    finals = [curve.final for curve in run.curves]
    target = float(np.median(finals))
    pairs = _pairs(run, treated) if treated and treated is not run else []
    reached = _crossings(pairs or [(curve, curve) for curve in run.curves], target)
    over = speedup(*reached, target) if pairs else None
    bytes_per_token = run.manifest["data"]["bytes_per_token"]
    return Arm(
        run=run,
        final=interval(finals),
        bits_per_byte=float(np.mean(finals)) / math.log(2) / bytes_per_token,
        area=float(np.mean([np.trapezoid(c.nats, c.steps) / (c.steps[-1] - c.steps[0]) for c in run.curves])),
        overhead=plain.tokens_per_second / run.tokens_per_second - 1 if plain else math.nan,
        target=target,
        steps=_geometric(reached[0]),
        treated_steps=_geometric(reached[1]),
        speedup=over,
        p_holm=math.nan,
        profile=[speedup(*_crossings(pairs, each), each) for each in _targets(run, target)] if pairs else [],
        seconds_speedup=over.mean * treated.tokens_per_second / run.tokens_per_second if over else math.nan,
    )


def _pairs(baseline: Run, treated: Run) -> list[tuple[Curve, Curve]]:
    """The curves of the seeds that both have."""
    mine = {curve.seed: curve for curve in treated.curves}
    return [(curve, mine[curve.seed]) for curve in baseline.curves if curve.seed in mine]


def _crossings(pairs: Sequence[tuple[Curve, Curve]], target: float) -> tuple[list[Crossing], list[Crossing]]:
    return tuple([crossing(pair[side].steps, pair[side].nats, target) for pair in pairs] for side in (0, 1))


def _geometric(crossings: Sequence[Crossing]) -> float:
    return float(np.exp(np.mean([math.log(each.steps) for each in crossings])))


def _targets(run: Run, final: float) -> np.ndarray:
    """From what the arm reaches after a twentieth of its steps down to its median final loss, evenly in nats."""
    early = np.mean([np.interp(0.05 * run.steps, curve.steps, curve.nats) for curve in run.curves])
    return np.linspace(early, final, 25)


@dataclass(frozen=True)
class Tuning:
    """One arm of a grid: its final loss at every rate."""

    arm: str
    rates: list[float]
    finals: list[float]  # nats per token, mean over the tuning seeds; inf where a member diverged
    seeds: int

    @property
    def best(self) -> float:
        """The rate of the lowest loss."""
        return self.rates[int(np.argmin(self.finals))]

    def loss_of(self, rate: float) -> float:
        """Nats per token that the arm loses at `rate` against its best; nan for a rate that is not on the grid."""
        near = [final for each, final in zip(self.rates, self.finals, strict=True) if math.isclose(each, rate)]
        return near[0] - min(self.finals) if near else math.nan


def tune(sweep: Sweep) -> list[Tuning]:
    """What a grid says of each arm that finished."""
    made = [_archived(row, sweep) for row in sweep.archive.get("tuning", [])]
    for run in sweep.runs:
        if not run.finished:
            continue
        finals = []
        for rate in run.rates:
            members = [member for member in run.manifest["members"] if member["rate"] == rate]
            curves = [curve for curve in run.curves if curve.rate == rate]
            # A rate at which a member diverged is no rate to choose.
            finals.append(float(np.mean([c.final for c in curves])) if len(curves) == len(members) else math.inf)
        made.append(Tuning(run.arm, run.rates, finals, len({member["seed"] for member in run.manifest["members"]})))
    return made


def _archived(row: dict[str, Any], sweep: Sweep) -> Tuning:
    try:
        finals = [math.inf if final is None else float(final) for final in row["final_nats"]]
        return Tuning(row["arm"], [float(rate) for rate in row["rates"]], finals, int(row["seeds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{sweep.path / 'summary.json'} is not a report's ({error}): it is damaged") from error


def unfair(sweep: Sweep) -> list[str]:
    """In words, everything but the encoding in which the arms of a comparison differ. Learning rates may: each arm's is
    tuned, and is shown."""
    warnings = []
    for key, values in _facts(sweep.runs).items():
        if len(set(values.values())) > 1:
            alike: dict[str, list[str]] = {}
            for arm, value in values.items():
                alike.setdefault(value if len(value) <= 40 else f"{value[:40]}...", []).append(arm)
            shown = "; ".join(f"{', '.join(arms)}: {value}" for value, arms in alike.items())
            warnings.append(f"The arms differ in {key} ({shown}).")
    unfinished = [f"{run.arm} ({run.status['status']})" for run in sweep.runs if not run.finished]
    if unfinished:
        warnings.append(f"Not every run of {sweep.name} finished: {', '.join(unfinished)}.")
    for run in sweep.runs:
        if run.status.get("diverged"):
            warnings.append(f"Members of {run.arm} diverged and are left out: {run.status['why']}.")
    return warnings


def _facts(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Key -> arm -> value, for every fact in which fair arms agree."""
    facts: dict[str, dict[str, str]] = {}
    for run in runs:
        config = _flat(run.config)
        # What a run has consumed is compared at the end of runs that came to it.
        equal = [key for key in FACTS if key != "batches" or run.finished]
        manifest = _flat({key: run.manifest.get(key) for key in equal})
        manifest |= _flat({"fingerprint": run.manifest.get("data", {}).get("fingerprint")})
        for key, value in {**config, **manifest}.items():
            if not key.startswith("model.position") and key not in ("optimizer.rate", "data.cache"):
                facts.setdefault(key, {})[run.arm] = str(value)
    return facts


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{at}.{key}" if at else key).items()}
    return {at: value}
