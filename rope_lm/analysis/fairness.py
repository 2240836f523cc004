"""Differences that make a comparison unfair, in words. The page shows all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rope_lm.analysis.runs import Run, Sweep
from rope_lm.analysis.tuning import tune

# Entries of a manifest that are equal in fair arms.
FACTS = (
    "commit",
    "diff",
    "kernel",
    "execution",
    "precision",
    "device",
    "versions",
    "environment",
    "deterministic",
    "batches",
)
# Entries of a manifest that are equal in all settings of a study, and in the grid that its learning rates come from.
SHARED = ("commit", "diff", "device", "versions", "environment")
# Entries of a config that the best learning rate depends on and that do not differ between settings.
TUNED_FOR = ("steps", "data.name", "data.tokenizer", "data.length", "data.batch", "optimizer.schedule")
LOST = "they count as never reaching any loss that they had not reached by then, and are left out of mean losses"
CONSEQUENCES = {
    "seeds": " Only seeds that both arms have are compared. Seconds, which are those of all seeds together, are not.",
    "fingerprint.tokenizer": " They are compared in bits per byte: nats per token depend on the tokenizer.",
    "fingerprint.text": " They read different texts.",
    "optimizer.learning_rate": " An arm that was tuned on more learning rates has had more chances to do well.",
    "objective.name": " Their losses cannot be compared, and are not.",
}


def warnings(sweeps: Sequence[Sweep]) -> list[str]:
    """Return all warnings: within each setting, between the settings of a sweep, and between sweeps."""
    found = [text for sweep in sweeps for setting in sweep.settings for text in unfair(setting)]
    for sweep in sweeps:
        found += _between(
            f"The settings of {sweep.name}", {setting.setting: setting.runs for setting in sweep.settings}
        )
    found += _reused_seeds(sweeps) + _between("The sweeps", {sweep.name: sweep.runs for sweep in sweeps})
    return found + _tuned_otherwise(sweeps)


def unfair(sweep: Sweep) -> list[str]:
    """Return the differences between the arms of one setting, apart from the encoding.

    Learning rates may differ, because each arm's is tuned and shown. The grids that they are tuned on may not.
    """
    facts = _facts(sweep.runs)
    if sweep.grid:
        grids = {tuning.arm: ", ".join(f"{rate:g}" for rate in tuning.learning_rates) for tuning in tune(sweep)}
        facts["optimizer.learning_rate"] = grids
    found = _differences(f"The arms of {sweep.title}" if sweep.setting else "The arms", facts)
    if unfinished := [f"{run.arm} ({run.status['status']})" for run in sweep.runs if not run.finished]:
        found.append(f"Not every run of {sweep.title} finished: {', '.join(unfinished)}.")
    for run in sweep.runs:
        if run.status.get("diverged"):
            found.append(f"Members of {run.arm} diverged ({run.status['why']}): {LOST}.")
        found += [
            f"{run.arm} was continued to {now:,} steps instead of {before:,}: its schedule is not that of one run."
            for before, now in run.budgets
        ]
        if members := ", ".join(f"member {member}" for member in run.not_finite):
            found.append(f"Members of {run.arm} end at a loss that is not finite ({members}): {LOST}.")
    return found


def _between(subject: str, groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return a sentence for each fact in which groups of runs should not differ but do.

    Each group is represented by its first run: `unfair` reports differences within a setting.
    """
    facts: dict[str, dict[str, str]] = {}
    for name, runs in groups.items():
        for manifest in [run.manifest for run in runs if run.manifest.get("data")][:1]:
            shared = {key: manifest[key] or "none" for key in SHARED if key in manifest}
            shared |= {"fingerprint": manifest["data"]["fingerprint"]}
            for key, value in flat(shared).items():
                facts.setdefault(key, {})[name] = str(value)
    variables = [key for key in facts if key.startswith("environment")]
    unset = {name: "none" for key in variables for name in facts[key]}  # earlier versions did not record it
    facts |= {key: unset | facts[key] for key in variables}
    return _differences(subject, facts)


def _differences(subject: str, facts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a sentence for each fact (key -> name -> value) that is not equal for all names."""
    return [
        f"{subject} differ in {key} ({_grouped(values)}).{CONSEQUENCES.get(key, '')}"
        for key, values in facts.items()
        if len(set(values.values())) > 1
    ]


def _reused_seeds(sweeps: Sequence[Sweep]) -> list[str]:
    """Return warnings for seeds that chose the learning rates and are compared as well."""
    found = []
    for grid in (sweep for sweep in sweeps if sweep.grid):
        for sweep in (sweep for sweep in sweeps if not sweep.grid):
            if both := sorted(_seeds(grid) & _seeds(sweep)):
                found.append(
                    f"Seeds {', '.join(map(str, both))} chose the learning rates in {grid.name} and are compared in "
                    f"{sweep.name}: this favours the arms that were tuned on them. Use other seeds."
                )
    return found


def _seeds(sweep: Sweep) -> set[int]:
    return {seed for run in sweep.runs for seed in run.seeds} | {seed for row in sweep.tuning for seed in row["seeds"]}


def _tuned_otherwise(sweeps: Sequence[Sweep]) -> list[str]:
    """Return warnings for arms that are not at the best learning rate of the grids given, or not on a grid at all.

    Also warns if the grid and the comparison differ in something that the best learning rate depends on.
    """
    grids = [sweep for sweep in sweeps if sweep.grid]
    best = {(tuning.setting, tuning.arm): tuning.best for grid in grids for tuning in tune(grid)}
    found = []
    for sweep in (sweep for sweep in sweeps if best and not sweep.grid):
        arms = {(setting.setting, run.arm): run for setting in sweep.settings for run in setting.runs if run.seeds}
        missing = ["/".join(filter(None, key)) for key in arms if key not in best]
        other = [
            f"{'/'.join(filter(None, key))} {run.learning_rates[0]:g}, not {best[key]:g}"
            for key, run in arms.items()
            if key in best and not math.isclose(best[key], run.learning_rates[0])
        ]
        if other:
            found.append(f"Arms of {sweep.name} are not at their best learning rate: {'; '.join(other)}.")
        if missing and len(missing) == len(sweep.runs):
            found.append(f"No arm of {sweep.name} is on a grid given here.")
            continue
        if missing:
            found.append(f"Arms of {sweep.name} are on no grid given here: {', '.join(missing)}.")
        for grid in (grid for grid in grids if grid.runs and sweep.runs):
            configs = {name: flat(runs[0].config) for name, runs in ((sweep.name, sweep.runs), (grid.name, grid.runs))}
            facts = {key: {name: str(config.get(key)) for name, config in configs.items()} for key in TUNED_FOR}
            found += _differences(f"{sweep.name} and the grid of its learning rates", facts)
    return found


def _grouped(values: Mapping[str, str]) -> str:
    """Return the names grouped by value, as text: "a, b: 1; c: 2"."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    shown = {value: value if len(value) <= 40 else f"{value[:40]}..." for value in groups}
    return "; ".join(f"{', '.join(names)}: {shown[value]}" for value, names in groups.items())


def _facts(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Return key -> arm -> value for every fact that is equal in fair arms."""
    facts: dict[str, dict[str, str]] = {}
    for run in runs:
        # The batches consumed are comparable only between runs that finished.
        keys = [key for key in FACTS if key in run.manifest and (key != "batches" or run.finished)]
        values = flat(run.config) | flat({key: run.manifest[key] or "none" for key in keys})
        if run.manifest.get("data"):
            values |= flat({"fingerprint": run.manifest["data"]["fingerprint"]})
        values.pop("execution.kernel", None)  # the same as `kernel`
        for key, value in values.items():
            if not key.startswith("model.position") and key not in ("optimizer.learning_rate", "data.cache"):
                facts.setdefault(key, {})[run.arm] = str(value)
    for key, by_arm in facts.items():  # an entry that only some runs have is a difference
        for run in runs:
            if run.manifest.get("data") and (run.finished or not key.startswith("batches")):
                by_arm.setdefault(run.arm, "none")
    return facts


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by their dotted keys."""
    if not isinstance(value, dict):
        return {at: value}
    return {k: v for key, nested in value.items() for k, v in flat(nested, f"{at}.{key}" if at else key).items()}
