"""What makes a comparison unfair, in words: each is marked on the page, none is hidden."""

import math
from collections.abc import Sequence
from typing import Any

from rope_lm.analysis.comparison import tune
from rope_lm.analysis.runs import Run, Sweep

# Of a manifest, equal in fair arms.
FACTS = ("commit", "diff", "kernel", "execution", "precision", "device", "versions", "deterministic", "batches")
# Of a manifest, equal in all settings of a study and in the grid that its rates come from.
SHARED = ("commit", "diff", "device", "versions")
# Of a config, what the best rate hangs on and settings do not differ in.
TUNED_FOR = ("steps", "data.name", "data.tokenizer", "data.length", "data.batch", "optimizer.schedule")


def warnings(sweeps: Sequence[Sweep]) -> list[str]:
    """All that the page warns of: within each setting, between the settings of a sweep, and between sweeps."""
    found = [text for sweep in sweeps for setting in sweep.settings for text in unfair(setting)]
    found += [text for sweep in sweeps for text in _between(f"The settings of {sweep.name}", _by_setting(sweep))]
    found += _reused_seeds(sweeps) + _between("The sweeps", {sweep.name: sweep.runs for sweep in sweeps})
    return found + _tuned_otherwise(sweeps)


def unfair(sweep: Sweep) -> list[str]:
    """Everything but the encoding in which the arms of one setting differ. Learning rates may: each arm's is tuned, and
    is shown. The grids that they are tuned on may not."""
    found, where = [], f"The arms of {sweep.title}" if sweep.setting else "The arms"
    for key, values in [*_facts(sweep.runs).items(), *_grids(sweep)]:
        if len(set(values.values())) > 1:
            found.append(f"{where} differ in {key} ({_alike(values)}).{CONSEQUENCES.get(key, '')}")
    unfinished = [f"{run.arm} ({run.status['status']})" for run in sweep.runs if not run.finished]
    if unfinished:
        found.append(f"Not every run of {sweep.title} finished: {', '.join(unfinished)}.")
    for run in sweep.runs:
        if run.status.get("diverged"):
            found.append(f"Members of {run.arm} diverged ({run.status['why']}): {LOST}.")
        for was, now in run.budgets:
            found.append(
                f"{run.arm} went on to {now:,} steps instead of {was:,}: its schedule is that of no straight run."
            )
        if run.not_finite:
            members = ", ".join(f"member {member}" for member in run.not_finite)
            found.append(f"Members of {run.arm} end at a loss that is not finite ({members}): {LOST}.")
    return found


# What becomes of members that came to no loss at the end.
LOST = "they count as never reaching what they had not reached, and are left out of mean losses"
CONSEQUENCES = {
    "seeds": " Only seeds that both arms have are compared, and seconds, which are of all seeds together, are not.",
    "fingerprint.tokenizer": " They are compared in bits per byte: nats per token of different tokens do not compare.",
    "fingerprint.text": " They read different texts.",
    "optimizer.learning_rate": " An arm that was tuned on more rates has had more chances to do well.",
    "objective.name": " Their losses do not compare, and are not compared.",
}


def _grids(sweep: Sweep) -> list[tuple[str, dict[str, str]]]:
    """For each setting of a grid, the rates of its arms; an archive has all settings together."""
    grids: dict[str, dict[str, str]] = {}
    for tuning in tune(sweep) if sweep.grid else []:
        grids.setdefault(tuning.setting, {})[tuning.arm] = ", ".join(f"{rate:g}" for rate in tuning.rates)
    return [("optimizer.learning_rate", rates) for rates in grids.values()]


def _by_setting(sweep: Sweep) -> dict[str, list[Run]]:
    return {each.setting: each.runs for each in sweep.settings}


def _between(where: str, groups: dict[str, list[Run]]) -> list[str]:
    """In what groups of runs differ that should not. A difference within a group is told there."""
    values: dict[str, dict[str, str]] = {}
    for name, runs in groups.items():
        described = [run for run in runs if run.manifest.get("data")]
        if not described:
            continue
        manifest = described[0].manifest
        facts = _flat({key: manifest.get(key) for key in SHARED} | {"fingerprint": manifest["data"]["fingerprint"]})
        for key, value in facts.items():
            values.setdefault(key, {})[name] = str(value)
    return [
        f"{where} differ in {key} ({_alike(each)}).{CONSEQUENCES.get(key, '')}"
        for key, each in values.items()
        if len(set(each.values())) > 1
    ]


def _reused_seeds(sweeps: Sequence[Sweep]) -> list[str]:
    """A seed that chose the rates has seen the answer: it is no test."""
    found = []
    for grid in (sweep for sweep in sweeps if sweep.grid):
        for sweep in (sweep for sweep in sweeps if not sweep.grid):
            both = sorted(_seeds(grid) & _seeds(sweep))
            if both:
                found.append(
                    f"Seeds {', '.join(map(str, both))} chose the learning rates in {grid.name} and are compared in "
                    f"{sweep.name}: that flatters the arms that were tuned on them; use others."
                )
    return found


def _seeds(sweep: Sweep) -> set[int]:
    archived = {seed for run in sweep.archive.get("runs", []) for seed in run.get("seeds", [])}
    return archived | {member["seed"] for run in sweep.runs for member in run.manifest["members"]}


def _tuned_otherwise(sweeps: Sequence[Sweep]) -> list[str]:
    """Beside a grid, the arms of each comparison that are not at their best rate on it, or not on it at all; and in
    what the two differ that decides which rate is best."""
    grids, found = [sweep for sweep in sweeps if sweep.grid], []
    best = {(tuning.setting, tuning.arm): tuning.best for grid in grids for tuning in tune(grid)}
    if not best:
        return []
    for sweep in (sweep for sweep in sweeps if not sweep.grid):
        other, unknown = [], []
        for setting in sweep.settings:
            for run in (run for run in setting.runs if run.rates):
                name, rate = f"{setting.setting}/{run.arm}".lstrip("/"), best.get((setting.setting, run.arm))
                if rate is None:
                    unknown.append(name)
                elif not math.isclose(rate, run.rates[0]):
                    other.append(f"{name} {run.rates[0]:g}, not {rate:g}")
        if other:
            found.append(f"Arms of {sweep.name} are not at the rate that was best for them: {'; '.join(other)}.")
        if unknown and len(unknown) == len(sweep.runs):
            found.append(f"No arm of {sweep.name} is on a grid here.")
            continue
        if unknown:
            found.append(f"Arms of {sweep.name} are on no grid here: {', '.join(unknown)}.")
        for grid in (grid for grid in grids if grid.runs and sweep.runs):
            values = {each.name: _flat(each.runs[0].config) for each in (sweep, grid)}
            differ = [key for key in TUNED_FOR if len({str(value.get(key)) for value in values.values()}) > 1]
            for key in differ:
                shown = _alike({name: str(value.get(key)) for name, value in values.items()})
                found.append(f"The rates of {sweep.name} were tuned for another {key} ({shown}).")
    return found


def _alike(values: dict[str, str]) -> str:
    """The names by their value, those that are alike together."""
    alike: dict[str, list[str]] = {}
    for name, value in values.items():
        alike.setdefault(value, []).append(name)
    short = lambda value: value if len(value) <= 40 else f"{value[:40]}..."  # noqa: E731
    return "; ".join(f"{', '.join(names)}: {short(value)}" for value, names in alike.items())


def _facts(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Key -> arm -> value, for every fact in which fair arms agree."""
    facts: dict[str, dict[str, str]] = {}
    for run in runs:
        config = _flat(run.config)
        # What a run has consumed is compared at the end of runs that came to it.
        equal = [key for key in FACTS if key != "batches" or run.finished]
        manifest = _flat({key: run.manifest.get(key) or "none" for key in equal if key in run.manifest})
        if run.manifest.get("data"):
            manifest |= _flat({"fingerprint": run.manifest["data"]["fingerprint"]})
        for key, value in {**config, **manifest}.items():
            if not key.startswith("model.position") and key not in ("optimizer.learning_rate", "data.cache"):
                facts.setdefault(key, {})[run.arm] = str(value)
    for key, values in facts.items():  # what only some of the runs record is a difference
        for run in runs:
            if run.manifest.get("data") and (run.finished or not key.startswith("batches")):
                values.setdefault(run.arm, "none")
    return facts


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{at}.{key}" if at else key).items()}
    return {at: value}
