"""Grids of learning rates: each arm's best, and how a speed-up depends on the learning rate."""

import math
from dataclasses import dataclass

import numpy as np

from rope_lm.analysis.comparison import contrast, paired
from rope_lm.analysis.estimates import Effect
from rope_lm.analysis.runs import Run, Sweep


@dataclass(frozen=True)
class Tuning:
    """One arm of a grid: its final loss at each learning rate."""

    arm: str
    setting: str
    learning_rates: list[float]  # peak, ascending
    final_nats: list[float]  # per token, mean over the tuning seeds; inf if a member has no finite loss
    seeds: list[int]

    @property
    def best(self) -> float:
        """The learning rate with the lowest loss; nan if no loss is finite."""
        finite = math.isfinite(min(self.final_nats))
        return self.learning_rates[int(np.argmin(self.final_nats))] if finite else math.nan

    @property
    def at_edge(self) -> bool:
        """True if the best learning rate is the lowest or the highest: a wider grid might hold a better one."""
        return len(self.learning_rates) > 1 and self.best in (self.learning_rates[0], self.learning_rates[-1])


def tune(sweep: Sweep) -> list[Tuning]:
    """Return the grid of each arm that finished, setting by setting."""
    tunings = [
        Tuning(**{**row, "final_nats": [math.inf if nats is None else nats for nats in row["final_nats"]]})
        for row in sweep.tuning
    ]
    return tunings + [
        Tuning(run.arm, setting.setting, run.learning_rates, [_final(run.at(r)) for r in run.learning_rates], run.seeds)
        for setting in sweep.settings
        for run in setting.runs
        if run.finished
    ]


def _final(run: Run) -> float:
    """Return the mean final loss; inf if a member has no finite one, so that this learning rate is not chosen."""
    finals = [curve.final for curve in run.curves]
    return float(np.mean(finals)) if len(finals) == len(run.manifest["members"]) else math.inf


@dataclass(frozen=True)
class Sensitivity:
    """The treatment's speed-up over one baseline at different learning rates.

    It is measured on tuning seeds, so it is no substitute for a comparison.
    """

    baseline: str
    learning_rates: list[float]
    shared: list[Effect | None]  # both arms at one learning rate; None if no pair of members is finite
    tuned: Effect | None  # each arm at its own best


def sensitivity(sweep: Sweep, treatment: str) -> list[Sensitivity]:
    """Return the treatment's speed-up over each baseline in one setting of a grid.

    It is given at each shared learning rate, and with each arm at its own best.
    """
    best = {tuning.arm: tuning.best for tuning in tune(sweep)}
    runs = {run.arm: run for run in sweep.runs if run.arm in best}
    if treatment not in runs:
        return []
    found = []
    for name in (name for name in runs if name != treatment):
        shared = sorted({*runs[name].learning_rates} & {*runs[treatment].learning_rates})
        pairs = [(rate, rate) for rate in shared] + [(best[name], best[treatment])]
        speedups = [_speedup(runs[name].at(own), runs[treatment].at(other)) for own, other in pairs]
        found.append(Sensitivity(name, shared, speedups[:-1], speedups[-1]))
    return found


def _speedup(baseline: Run, treatment: Run) -> Effect | None:
    return contrast(baseline, treatment).steps if paired(baseline, treatment) else None
