"""Everything that a report shows, computed from sweeps before anything is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rope_lm.analysis import claims, fairness, methods
from rope_lm.analysis.comparison import Comparison, compare
from rope_lm.analysis.runs import Run, Sweep, distinct
from rope_lm.analysis.tuning import Sensitivity, Tuning, sensitivity, tune
from rope_lm.refusal import Refusal


@dataclass(frozen=True)
class Section:
    """One setting of one sweep: a comparison or a learning-rate grid."""

    sweep: Sweep  # of the setting
    prefix: str  # of the names of its figures
    comparison: Comparison | None = None  # None for a grid, and if arms cannot be compared
    refused: str = ""  # why they cannot
    tunings: Sequence[Tuning] = ()  # of a grid
    sensitivities: Sequence[Sensitivity] = ()  # of a grid


@dataclass(frozen=True)
class Factor:
    """The settings of one sweep that differ in one number."""

    sweep: Sweep
    key: str  # "parameters", or the dotted key of the config
    values: list[float]  # ascending
    settings: list[Comparison]

    @property
    def name(self) -> str:
        """The number's name in words."""
        return self.key.rpartition(".")[2].replace("_", " ")

    @property
    def prefix(self) -> str:
        """The prefix of the name of its figure."""
        return f"{plain(self.sweep.name)}-"


@dataclass(frozen=True)
class Findings:
    """Comparisons, grids, claims and warnings of sweeps with unique names."""

    sweeps: Sequence[Sweep]
    treatment: str
    command: str

    @property
    def runs(self) -> list[tuple[Sweep, Run]]:
        """All runs, each with its sweep."""
        return [(sweep, run) for sweep in self.sweeps for run in sweep.runs]

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the first run; of a comparison if there is one."""
        return next((run.manifest for _, run in sorted(self.runs, key=lambda pair: pair[0].grid)), {})

    @cached_property
    def sections(self) -> list[Section]:
        """Comparisons and grids, in the order given."""
        return [self._section(sweep, setting) for sweep in self.sweeps for setting in sweep.settings]

    def _section(self, sweep: Sweep, setting: Sweep) -> Section:
        several = len([other for other in self.sweeps if other.grid == sweep.grid]) > 1
        prefix = "".join(f"{plain(part)}-" for part in (sweep.name if several else "", setting.setting) if part)
        if setting.grid:
            return Section(setting, prefix, None, "", tune(setting), sensitivity(setting, self.treatment))
        try:
            return Section(setting, prefix, compare(setting, self.treatment))
        except Refusal as refusal:
            return Section(setting, prefix, None, str(refusal))

    @property
    def comparisons(self) -> list[Comparison]:
        """The comparisons that could be made."""
        return [section.comparison for section in self.sections if section.comparison]

    @cached_property
    def claims(self) -> list[claims.Verdict]:
        """The verdicts on all claims."""
        return claims.judge_all(self.sweeps)

    @cached_property
    def matrix(self) -> list[Comparison]:
        """A row for each setting, and for each treatment that a claim names in it."""
        rows = [
            comparison if treatment == comparison.treatment else compare(comparison.sweep, treatment)
            for comparison in self.comparisons
            for treatment in dict.fromkeys(
                [self.treatment, *(claim["treatment"] for claim in comparison.sweep.claims.values())]
            )
            if treatment in {arm.name for arm in comparison}
        ]
        return [row for row in rows if row.tested]

    @cached_property
    def factors(self) -> list[Factor]:
        """The sweeps whose settings differ in one number."""
        found = {
            sweep.name: [found for found in self.comparisons if found.sweep.name == sweep.name] for sweep in self.sweeps
        }
        factors = [_factor(sweep, found[sweep.name]) for sweep in self.sweeps]
        return [factor for factor in factors if factor]

    @cached_property
    def warnings(self) -> list[str]:
        """Everything that is unfair and everything that could not be compared, in words."""
        refusals = [section.refused for section in self.sections if section.refused]
        edges: dict[str, list[str]] = {}
        for section in self.sections:
            for tuning in (tuning for tuning in section.tunings if tuning.at_edge):
                edges.setdefault(section.sweep.title, []).append(f"{tuning.arm} {tuning.best:g}")
        return [
            *fairness.warnings(self.sweeps),
            *(f"{refusal[0].upper()}{refusal[1:]}." for refusal in refusals),
            *(
                f"The best learning rate is at the edge of the grid {title} ({', '.join(arms)}): a wider grid may hold "
                "a better one."
                for title, arms in edges.items()
            ),
        ]

    @property
    def methods(self) -> list[str]:
        """A paragraph on each sweep in which something ran."""
        return [text for sweep in self.sweeps if (text := methods.paragraph(sweep))]


def gather(sweeps: Sequence[Sweep], treatment: str, command: str) -> Findings:
    """Return the findings of sweeps about the speed-up of one arm. Raises Refusal for a folder that is given twice."""
    return Findings(distinct(sweeps), treatment, command)


def plain(name: str) -> str:
    """Return a name with only characters that are safe in file names and SVG ids."""
    return re.sub(r"[^\w.-]", "-", name)


def _factor(sweep: Sweep, settings: list[Comparison]) -> Factor | None:
    """Return the number in which the settings of a sweep differ: their size, or one key of the config."""
    if len(settings) < 2 or len(settings) < len(sweep.settings) or not all(setting.tested for setting in settings):
        return None
    runs = [setting.arms[0].run for setting in settings]
    configs = [_numbers(run.config) for run in runs]
    differing = {key for key in configs[0] if len({str(config.get(key)) for config in configs}) > 1}
    if differing & {"model.width", "model.layers"}:
        key = "parameters"
        values = [run.manifest["parameters"] - run.manifest["parameters_position"] for run in runs]
    elif len(differing) == 1:
        (key,) = differing
        values = [config[key] for config in configs]
    else:
        return None
    if len({run.objective for run in runs}) > 1 or len(set(values)) < len(values):
        return None
    order = sorted(range(len(settings)), key=lambda i: values[i])
    return Factor(sweep, key, [values[i] for i in order], [settings[i] for i in order])


def _numbers(config: dict[str, Any]) -> dict[str, float]:
    """Return the numbers in a config by their dotted keys, apart from those of the encoding and the learning rate."""
    return {
        key: value
        for key, value in fairness.flat(config).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not key.startswith("model.position.")
    }
