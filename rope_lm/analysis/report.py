"""The report: summary.json, runs.json, tables, figures and one self-contained page, from sweeps alone."""

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from rope_lm.analysis import claims, fairness, figures, methods
from rope_lm.analysis.claims import Verdict
from rope_lm.analysis.comparison import Arm, Comparison, Sensitivity, Tuning, compare, sensitivity, tune
from rope_lm.analysis.convergence import Difference, Speedup, least_pairs
from rope_lm.analysis.published import FINDINGS
from rope_lm.analysis.runs import Sweep, distinct, pack
from rope_lm.refusal import Refusal

COLUMNS = {
    "arm": "encoding",
    "final": "final loss, nats/token [95%]",
    "bits": "bits/byte",
    "target": "steps to the target",
    "treated": "steps of {treatment} to it",
    "speedup": "speed-up of {treatment} [95%]",
    "p": "p (Holm)",
    "verdict": "{treatment} faster?",
    "detectable": "smallest speed-up that could be found",
    "seconds": "speed-up in seconds [95%]",
    "flops": "speed-up in FLOPs [95%]",
    "gap": "ends above {treatment} by, nats/token [95%]",
    "area": "mean loss over the run",
    "tokens": "tokens/s",
    "overhead": "time over none",
    "parameters": "parameters (its own)",
    "rate": "peak rate",
}
BOUNDS = {"": "", "lower": "≥ ", "upper": "≤ ", "unknown": "? "}
FIRST = ("sinusoidal", "learned", "relative_bias", "none")  # of the matrix's columns


@dataclass(frozen=True)
class Section:
    """One setting of one sweep, as it stands on the page."""

    sweep: Sweep  # of the setting
    prefix: str  # of its figures' names
    comparison: Comparison | None  # None where it could not be made, and of a grid
    refused: str  # why it could not
    tunings: list[Tuning]  # of a grid
    sensitivities: list[Sensitivity]  # of a grid


@dataclass(frozen=True)
class Factor:
    """Settings of one sweep that differ in one number."""

    sweep: Sweep
    label: str
    values: list[float]  # ascending
    settings: list[Comparison]

    @property
    def name(self) -> str:
        """In words."""
        return self.label.rpartition(".")[2].replace("_", " ")


@dataclass(frozen=True)
class Report:
    """Everything that is written, before it is."""

    sweeps: Sequence[Sweep]
    treatment: str
    command: str

    @cached_property
    def sections(self) -> list[Section]:
        """Comparisons and grids, in the order given."""
        return [
            self._section(setting, self._prefix(sweep, setting)) for sweep in self.sweeps for setting in sweep.settings
        ]

    def _prefix(self, sweep: Sweep, setting: Sweep) -> str:
        """Of figures' names: the parts that tell them apart, with the sweep's name where there are several."""
        alike = [each for each in self.sweeps if each.grid == sweep.grid]
        parts = [sweep.name] * (len(alike) > 1) + [setting.setting] * bool(setting.setting)
        return "".join(f"{_plain(part)}-" for part in parts)

    def _section(self, setting: Sweep, prefix: str) -> Section:
        if setting.grid:
            return Section(setting, prefix, None, "", tune(setting), sensitivity(setting, self.treatment))
        try:
            return Section(setting, prefix, compare(setting, self.treatment), "", [], [])
        except Refusal as refusal:
            return Section(setting, prefix, None, str(refusal), [], [])

    @property
    def comparisons(self) -> list[Comparison]:
        """Those that could be made."""
        return [section.comparison for section in self.sections if section.comparison]

    @property
    def tunings(self) -> list[Tuning]:
        """Of all grids."""
        return [tuning for section in self.sections for tuning in section.tunings]

    @cached_property
    def claims(self) -> list[Verdict]:
        """The verdicts on all claims."""
        return claims.judge_all(self.sweeps)

    @cached_property
    def matrix(self) -> list[Comparison]:
        """A row for each setting, and for each treatment that a claim names in it."""
        rows = []
        for made in self.comparisons:
            named = [claim["treatment"] for claim in made.sweep.claims.values()]
            present = {arm.name for arm in made}
            for treatment in dict.fromkeys([self.treatment, *named]):
                if treatment in present:
                    rows.append(made if treatment == made.treatment else compare(made.sweep, treatment))
        return [row for row in rows if row.tested]

    @property
    def baselines(self) -> list[str]:
        """The columns of the matrix."""
        names = {arm.name for row in self.matrix for arm in row.tested}
        return [name for name in FIRST if name in names] + sorted(names - set(FIRST))

    @cached_property
    def factors(self) -> list[Factor]:
        """The sweeps whose settings differ in one number."""
        found = []
        for sweep in self.sweeps:
            made = [each for each in self.comparisons if each.sweep.name == sweep.name and each.tested]
            if len(made) > 1 and len(made) == len(sweep.settings) and (factor := _factor(sweep, made)):
                found.append(factor)
        return found

    @cached_property
    def warnings(self) -> list[str]:
        """All that is unfair, and all that could not be compared, in words."""
        refused = [
            section.refused[0].upper() + section.refused[1:] + "." for section in self.sections if section.refused
        ]
        edges: dict[str, list[str]] = {}
        for section in self.sections:
            for tuning in (each for each in section.tunings if each.at_edge):
                edges.setdefault(section.sweep.title, []).append(f"{tuning.arm} {tuning.best:g}")
        wider = [
            f"The best rate is at the edge of the grid {title} ({', '.join(arms)}): a wider grid may hold a better one."
            for title, arms in edges.items()
        ]
        return fairness.warnings(self.sweeps) + refused + wider


def write(sweeps: Sequence[Sweep], out: Path, treatment: str, command: str) -> dict[str, Any]:
    """Writes the report into the folder `out` and returns the summary.

    With runs.json the folder is an archive: `load` reads it as it reads the runs, and the report of it is the same, but
    for what scripts.extrapolate and scripts.distance found, and for grids that were given as a summary. Raises Refusal
    for a folder that is given twice.
    """
    report = Report(distinct(sweeps), treatment, command)
    out.mkdir(parents=True, exist_ok=True)
    drawings = dict(_draw(report, out / "figures"))
    made = summary(report)
    _json(made, out / "summary.json", indent=1)
    if packed := [pack(sweep) for sweep in report.sweeps if sweep.runs]:
        _json({"schema": 1, "sweeps": packed}, out / "runs.json", indent=None)
    _tables(report, out)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rope_lm.analysis", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(
        report=report,
        summary=made,
        treatment=treatment,
        columns={key: text.format(treatment=treatment) for key, text in COLUMNS.items()},
        figures=drawings,
        findings=FINDINGS,
        methods=methods,
        row=table_row,
        sentence=sentence,
        noise=noise,
        least=least,
        bounded=bounded,
        plain=_plain,
        measure=measure,
        cell=cell,
        estimate=estimate,
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    return made


def _plain(name: str) -> str:
    """Of a name, what may stand in a file's name and in an SVG."""
    return re.sub(r"[^\w.-]", "-", name)


def _json(value: Any, path: Path, indent: int | None) -> None:
    path.write_text(json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def _factor(sweep: Sweep, made: list[Comparison]) -> Factor | None:
    """The number in which the settings differ: their size, or one key of the config."""
    configs = [_numbers(each.arms[0].run.config) for each in made]
    differ = {key for key in configs[0] if len({str(config.get(key)) for config in configs}) > 1}
    differ -= {"optimizer.learning_rate", "model.position.limit", "model.position.scale"}
    if differ & {"model.width", "model.layers"}:
        runs = [each.arms[0].run.manifest for each in made]
        label, values = "parameters", [run["parameters"] - run["parameters_position"] for run in runs]
    elif len(differ) == 1:
        (label,) = differ
        values = [config[label] for config in configs]
    else:
        return None
    if len({each.arms[0].run.objective for each in made}) > 1 or len(set(values)) < len(values):
        return None
    order = sorted(range(len(made)), key=lambda i: values[i])
    return Factor(sweep, label, [values[i] for i in order], [made[i] for i in order])


def _numbers(value: Any, at: str = "") -> dict[str, float]:
    """The numbers of a config, by their dotted names, but for those of its encoding."""
    if isinstance(value, dict):
        parts = [_numbers(each, f"{at}.{key}" if at else key) for key, each in value.items() if key != "position"]
        return {key: each for part in parts for key, each in part.items()}
    return {at: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else {}


def _draw(report: Report, folder: Path) -> Iterator[tuple[str, str]]:
    """Writes the figures that the data allows; yields their names and SVG, to stand in the page."""
    folder.mkdir(exist_ok=True)
    for name, figure in _figures(report):
        figures.save(figure, folder / name)
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        # Ids are made unique, since the drawings share one page.
        svg = svg[svg.index("<svg") :].replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
        yield name, svg.replace('xlink:href="#', f'xlink:href="#{name}-')


def _figures(report: Report) -> Iterator[tuple[str, Any]]:
    for section in report.sections:
        name, made = section.prefix, section.comparison
        if made and made.arms:
            yield f"{name}loss", figures.loss_curves(made)
        if made and made.tested:
            yield f"{name}speedup", figures.speedups(made)
            yield f"{name}profile", figures.profile(made)
        if seen := [run for run in section.sweep.runs if run.looks["mass"]]:
            yield f"{name}distance", figures.by_distance(seen)
            yield f"{name}heads", figures.by_head(seen)
        if read := [run for run in section.sweep.runs if run.beyond["rows"]]:
            yield f"{name}beyond", figures.beyond(read)
            yield f"{name}position", figures.by_position(read)
        if section.tunings:
            yield f"{name}tuning", figures.sensitivity(section.tunings)
        if section.sensitivities:
            yield f"{name}rates", figures.by_rate(section.sensitivities, report.treatment)
    for factor in report.factors:
        yield f"{_plain(factor.sweep.name)}-factor", figures.against(factor.settings, factor.values, factor.name)


def summary(report: Report) -> dict[str, Any]:
    """Everything on the page, as data; a number that does not exist is null."""
    sweeps, treatment = report.sweeps, report.treatment
    runs = [(sweep, run) for sweep in sweeps for run in sweep.runs]
    first = next((run.manifest for _, run in sorted(runs, key=lambda each: each[0].grid)), {})
    value = {
        "schema": 1,
        "command": report.command,
        "treatment": treatment,
        "claims": [_claim(verdict) for verdict in report.claims],
        "matrix": [_row(row) for row in report.matrix],
        "factors": [
            {
                "sweep": factor.sweep.name,
                "of": factor.label,
                "values": factor.values,
                "settings": [setting.sweep.setting for setting in factor.settings],
            }
            for factor in report.factors
        ],
        "settings": [
            {
                "sweep": made.sweep.name,
                "setting": made.sweep.setting,
                "objective": made.arms[0].run.objective,
                "attention": made.arms[0].run.attention,
                "unit": made.unit,
                "floor": made.floor._asdict(),
            }
            for made in report.comparisons
            if made.arms
        ],
        "arms": [_arm(made, arm, treatment) for made in report.comparisons for arm in made],
        "tuning": [
            {
                "arm": t.arm,
                "setting": t.setting,
                "best": t.best,
                "rates": t.rates,
                "final_nats": t.finals,
                "seeds": t.seeds,
            }
            for t in report.tunings
        ],
        "sensitivity": [
            {
                "setting": section.sweep.setting,
                "baseline": each.baseline,
                "rates": each.rates,
                "shared": [s and _speedup(s) for s in each.shared],
                "tuned": each.tuned and _speedup(each.tuned),
            }
            for section in report.sections
            for each in section.sensitivities
        ],
        "fingerprint": first.get("data", {}).get("fingerprint", {}),
        "device": first.get("device", {}),
        "versions": first.get("versions", {}),
        "methods": [text for sweep in sweeps if (text := methods.paragraph(sweep))],
        "warnings": report.warnings,
        "runs": [
            {
                "sweep": sweep.name,
                "arm": run.arm,
                "status": run.status["status"],
                "step": run.status.get("step"),
                "why": run.status.get("why", ""),
                "seeds": sorted({member["seed"] for member in run.manifest["members"]}),
                "rates": run.rates,
                "hours": run.hours,
                "commit": run.manifest.get("commit", ""),
            }
            for sweep, run in runs
        ],
    }
    return json.loads(json.dumps(_finite(value)))  # numpy's numbers become Python's


def _claim(made: Verdict) -> dict[str, Any]:
    keys = ("study", "name", "verdict", "late", "mean", "low", "high", "bound", "n", "p", "p_holm", "unit", "sentence")
    return {key: getattr(made, key) for key in keys} | {"claim": made.claim}


def _row(row: Comparison) -> dict[str, Any]:
    cells = {arm.name: _speedup(arm.speedup) for arm in row.tested}
    return {"sweep": row.sweep.name, "setting": row.sweep.setting, "treatment": row.treatment, "cells": cells}


def _speedup(s: Speedup) -> dict[str, Any]:
    return {key: getattr(s, key) for key in ("mean", "low", "high", "p", "verdict", "target", "n", "bound")}


def _difference(d: Difference) -> dict[str, Any]:
    return {key: getattr(d, key) for key in ("mean", "low", "high", "p", "bound")}


def _arm(made: Comparison, arm: Arm, treatment: str) -> dict[str, Any]:
    run, found = arm.run, arm.contrast
    return {
        "sweep": made.sweep.name,
        "setting": made.sweep.setting,
        "arm": arm.name,
        "encoding": run.encoding,
        "seeds": [curve.seed for curve in run.curves],
        "rate": run.rates[0],
        "status": run.status["status"],
        "final_nats": {**arm.final._asdict(), "by_seed": {str(c.seed): c.final for c in run.curves}},
        "first_nats": {str(c.seed): float(c.nats[0]) for c in run.curves},
        "batches": run.batches,
        "bits_per_byte": arm.bits_per_byte,
        "area": arm.area,
        "itself": arm.itself and _speedup(arm.itself),
        "beyond": [
            {key: row[key] for key in ("multiple", "scaling", "seeds", "apart", "sliding")}
            for row in run.beyond["rows"]
        ],
        "steps_to_target": {"target": arm.target, "own": arm.steps, treatment: arm.treated_steps},
        f"speedup_of_{treatment}": found
        and _speedup(found.steps)
        | {
            "p_holm": arm.p_holm,
            "in_seconds": _speedup(found.costs.seconds),
            "in_flops": _speedup(found.costs.flops),
            "to_median": _speedup(found.median.steps),
            "to_common": _speedup(found.common.steps),
            "detectable": found.detectable,
        },
        f"above_{treatment}": found and {"final": _difference(found.final), "area": _difference(found.area)},
        "profile": [
            {key: getattr(s, key) for key in ("target", "mean", "low", "high", "bound")}
            for s in (found.profile if found else [])
        ],
        "tokens_per_second": run.tokens_per_second,
        "overhead": arm.overhead,
        "parameters": run.manifest["parameters"],
        "parameters_position": run.manifest["parameters_position"],
    }


def table_row(made: Comparison, arm: Arm) -> dict[str, str]:
    """The cells of an arm's row, by the keys of COLUMNS."""
    found, run = arm.contrast, arm.run
    unit = "" if made.unit == "nats per token" else " bits/byte"
    cells = {
        "arm": arm.name,
        "final": estimate(arm.final, 3) + unit,
        "bits": f"{arm.bits_per_byte:.3f}",
        "target": f"{arm.steps:,.0f}",
        "area": f"{arm.area:.3f}{unit}",
        "tokens": f"{run.tokens_per_second:,.0f}",
        "overhead": "" if math.isnan(arm.overhead) or run.encoding == "none" else f"{100 * arm.overhead:+.1f}%",
        "parameters": f"{run.manifest['parameters']:,} ({run.manifest['parameters_position']:,})",
        "rate": f"{run.rates[0]:g}",
    }
    if found:
        cells |= {
            "treated": f"{arm.treated_steps:,.0f}",
            "speedup": bounded(found.steps),
            "p": f"{found.steps.p:.3g} ({arm.p_holm:.3g})",
            "verdict": found.steps.verdict,
            "detectable": "" if math.isnan(found.detectable) else f"{found.detectable:.2f}",
            "seconds": bounded(found.costs.seconds),
            "flops": "" if math.isnan(found.costs.flops.mean) else bounded(found.costs.flops),
            "gap": bounded(found.final, 3, sign="+") + unit,
        }
    return {key: cells.get(key, "") for key in COLUMNS}


def estimate(value: Any, digits: int, sign: str = "") -> str:
    """A mean with its interval; the mean alone where there is no interval."""
    number = f"{{:{sign}.{digits}f}}".format
    if math.isnan(value.low):
        return number(value.mean)
    return f"{number(value.mean)} [{number(value.low)}, {number(value.high)}]"


def bounded(value: Any, digits: int = 2, sign: str = "") -> str:
    """As `estimate`, and whether it is a bound."""
    return BOUNDS[value.bound] + estimate(value, digits, sign)


def cell(row: Comparison, baseline: str) -> Arm | None:
    """Of a row of the matrix."""
    return next((arm for arm in row.tested if arm.name == baseline), None)


def sentence(made: Comparison, arm: Arm) -> str:
    """The verdict over one baseline, in words."""
    s, treatment = arm.speedup, made.treatment
    budget = arm.run.steps
    end = {
        "supported": f"{treatment} converges faster than {arm.name}",
        "refuted": f"{treatment} converges more slowly than {arm.name}",
        "equivalent": f"{treatment} converges as fast as {arm.name}",
        "inconclusive": f"whether {treatment} converges faster than {arm.name} is open",
    }[s.verdict]
    both = ", to which every seed of both comes" if s.target == arm.contrast.common.steps.target else ""
    limits = f" Where {arm.name} did not reach it, its {budget:,} steps were counted: this is a lower bound."
    limits = limits if s.bound == "lower" else ""
    if math.isnan(s.low):
        why = "which takes two seeds that differ"
        return f"{end}: {s.mean:.2f} times the speed to a loss of {s.target:.3f}, without an interval, {why}.{limits}"
    return (
        f"{end}: {s.mean:.2f} times the speed (95% interval {s.low:.2f} to {s.high:.2f}, {s.n} seeds) to a loss of "
        f"{s.target:.3f} {made.unit}{both}.{limits}"
    )


def noise(made: Comparison) -> str:
    """What arms against themselves give, in words; "" where there are too few seeds for it."""
    floor = made.floor
    if math.isnan(floor.low):
        return ""
    pairs = max(arm.speedup.n for arm in made.tested)
    found = (
        f" {floor.positives} of {floor.tested} arms were found faster or slower than themselves."
        if floor.tested
        else ""
    )
    return (
        f"The noise floor (the grey band): arms against themselves on other seeds (A/A, {floor.pairs} pairs in all) "
        f"give a speed-up between {floor.low:.2f} and {floor.high:.2f} in 95% of comparisons of {pairs} pairs.{found}"
    )


def least(made: Comparison) -> str:
    """The lowest p that there can be, in words; "" where nothing was tested."""
    if not made.tested:
        return ""
    pairs, arms = max(arm.speedup.n for arm in made.tested), len(made.tested)
    lowest = 2.0 ** (1 - pairs)
    corrected = f", nor below {min(1, arms * lowest):.4g} after the correction over {arms} arms" if arms > 1 else ""
    more = f", and each of {arms} takes {least_pairs(arms)}" if arms > 1 else ""
    return (
        f"With {pairs} seeds it cannot be below {lowest:.4g}{corrected}, whatever the data: below 0.05 by it one "
        f"comparison takes {least_pairs(1)} seeds or more{more}."
    )


def _tables(report: Report, out: Path) -> None:
    """table.csv and table.tex of all arms; claims.csv and claims.tex where there are claims."""
    heads = [text.format(treatment=report.treatment) for text in COLUMNS.values()]
    rows = []
    for made in report.comparisons:
        where = f"{made.sweep.setting}/" if made.sweep.setting else ""
        rows += [[where + each for each in row[:1]] + row[1:] for row in map(list, _cells(made))]
    _table(heads, rows, out / "table")
    if report.claims:
        heads = ["claim", "setting", "source", "published", "measured here [95%]", "p (Holm)", "verdict"]
        _table(heads, [_claim_row(each) for each in report.claims], out / "claims")


def _cells(made: Comparison) -> list[list[str]]:
    return [list(table_row(made, arm).values()) for arm in made]


def _claim_row(made: Verdict) -> list[str]:
    c = made.claim
    measured = "" if math.isnan(made.mean) else measure(made)
    p = "" if math.isnan(made.p) else f"{made.p:.3g} ({made.p_holm:.3g})"
    verdict = made.verdict + (" (added after its runs began)" if made.late else "")
    return [made.sentence, c["setting"], c["source"], c["published"], measured, p, verdict]


def measure(made: Verdict) -> str:
    """What was measured of a claim."""
    if made.claim["outcome"] == "final":
        return f"{bounded(made, 3, sign='+')} {made.unit}, {made.n} seeds"
    return f"{bounded(made)} times, {made.n} seeds"


def _table(heads: list[str], rows: list[list[str]], path: Path) -> None:
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *rows])
    lines = [r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}", r"\toprule", _tex(heads), r"\midrule"]
    lines += [*map(_tex, rows), r"\bottomrule", r"\end{tabular}"]
    path.with_suffix(".tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tex(cells: Sequence[str]) -> str:
    special = {each: f"\\{each}" for each in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"≥": r"$\geq$", "≤": r"$\leq$"}
    return " & ".join("".join(special.get(letter, letter) for letter in cell) for cell in cells) + r" \\"


def _finite(value: Any) -> Any:
    """The same data with null for what is no number."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
