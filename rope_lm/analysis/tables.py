"""The tables of a report: for the page, the console, CSV and LaTeX."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rope_lm.analysis.claims import Verdict
from rope_lm.analysis.comparison import Arm, Comparison
from rope_lm.analysis.findings import Factor, Findings
from rope_lm.analysis.tuning import Sensitivity, Tuning

COLUMNS = {
    "arm": "encoding",
    "final": "final loss, nats/token [95%]",
    "bits": "bits/byte",
    "target": "steps to the target",
    "treated": "steps of {treatment} to it",
    "speedup": "speed-up of {treatment} [95%]",
    "p": "p (Holm)",
    "verdict": "{treatment} faster?",
    "detectable": "smallest detectable speed-up",
    "seconds": "speed-up in seconds [95%]",
    "flops": "speed-up in FLOPs [95%]",
    "gap": "final loss above {treatment}'s, nats/token [95%]",
    "area": "mean loss over the run",
    "tokens": "tokens/s",
    "overhead": "time over none",
    "parameters": "parameters (its own)",
    "rate": "peak learning rate",
}
FIRST = ("sinusoidal", "learned", "relative_bias", "none")  # columns of the matrix
BOUNDS = {"": "", "lower": "≥ ", "upper": "≤ ", "unknown": "? "}
Cell = str | tuple[str, str]  # text, or a first line and a note below it


class Table(NamedTuple):
    """Column heads and rows of cells."""

    heads: list[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def lines(self) -> list[list[str]]:
        """The rows with one line of text in each cell."""
        return [[cell if isinstance(cell, str) else f"{cell[0]} ({cell[1]})" for cell in row] for row in self.rows]


def estimate(value: Any, digits: int = 2, sign: str = "") -> str:
    """Return a mean with its interval, if it has one, marked if it is a bound."""
    mean, low, high = (f"{number:{sign}.{digits}f}" for number in (value.mean, value.low, value.high))
    bound = BOUNDS[getattr(value, "bound", "")]
    return bound + (mean if math.isnan(value.low) else f"{mean} [{low}, {high}]")


def claims(verdicts: Sequence[Verdict]) -> Table:
    """Return the claims, each beside its published finding."""
    return Table(
        ["claim", "setting", "source", "published", "measured here [95%]", "p (Holm)", "verdict"],
        [
            [
                verdict.sentence,
                *(verdict.claim[key] for key in ("setting", "source", "published")),
                _measured(verdict),
                _p(verdict.p, verdict.p_holm),
                (verdict.verdict, "added after its runs began") if verdict.late else verdict.verdict,
            ]
            for verdict in verdicts
        ],
    )


def _measured(verdict: Verdict) -> str:
    if not verdict.n:
        return ""
    final = verdict.claim["outcome"] == "final"
    shown = f"{estimate(verdict, 3, '+')} {verdict.unit}" if final else f"{estimate(verdict)} times"
    return f"{shown}, {verdict.n} seeds"


def _p(p: float, corrected: float) -> str:
    return "" if math.isnan(p) else f"{p:.3g} ({corrected:.3g})"


def matrix(findings: Findings) -> Table:
    """Return the verdicts and speed-ups of every setting over every baseline."""
    several = len([sweep for sweep in findings.sweeps if not sweep.grid]) > 1
    names = {arm.name for row in findings.matrix for arm, _ in row.tested}
    baselines = [name for name in FIRST if name in names] + sorted(names - set(FIRST))
    rows: list[list[Cell]] = []
    for row in findings.matrix:
        cells = {arm.name: (contrast.steps.verdict, estimate(contrast.steps)) for arm, contrast in row.tested}
        note = f"{row.sweep.name}, {row.treatment}" if row.sweep.setting and several else row.treatment
        rows.append([(row.sweep.setting or row.sweep.name, note), *(cells.get(name, "") for name in baselines)])
    return Table(["setting", *(f"over {name}" for name in baselines)], rows)


def factor(factor: Factor) -> Table:
    """Return the speed-up and the gap in final loss for each value of a factor."""
    heads, rows = [factor.name], []
    for value, setting in zip(factor.values, factor.settings, strict=True):
        tested = sorted(setting.tested, key=lambda pair: pair[0].name)
        cells = [(estimate(contrast.steps), estimate(contrast.final, 3, "+")) for _, contrast in tested]
        rows.append([f"{value:,}", *(cell for pair in cells for cell in pair)])
        heads += [
            head
            for arm, _ in tested
            for head in (f"over {arm.name}", f"final loss of {arm.name} above {setting.treatment}'s, {setting.unit}")
            if head not in heads
        ]
    return Table(heads, rows)


def numbers(comparison: Comparison) -> Table:
    """Return one row per arm, with all COLUMNS."""
    heads = [head.format(treatment=comparison.treatment) for head in COLUMNS.values()]
    return Table(heads, [list(cells(comparison, arm).values()) for arm in comparison])


def cells(comparison: Comparison, arm: Arm) -> dict[str, str]:
    """Return the cells of an arm's row by the keys of COLUMNS, in their order."""
    found, run = arm.contrast, arm.run
    unit = "" if comparison.unit == "nats per token" else " bits/byte"
    row = dict.fromkeys(COLUMNS, "") | {
        "arm": arm.name,
        "final": estimate(arm.final, 3) + unit,
        "bits": f"{arm.bits_per_byte:.3f}",
        "target": f"{arm.steps:,.0f}",
        "area": f"{arm.area:.3f}{unit}",
        "tokens": f"{run.tokens_per_second:,.0f}",
        "overhead": "" if math.isnan(arm.overhead) or run.encoding == "none" else f"{100 * arm.overhead:+.1f}%",
        "parameters": f"{run.manifest['parameters']:,} ({run.manifest['parameters_position']:,})",
        "rate": f"{run.learning_rates[0]:g}",
    }
    if not found:
        return row
    return row | {
        "treated": f"{arm.treated_steps:,.0f}",
        "speedup": estimate(found.steps),
        "p": _p(found.steps.p, arm.p_holm),
        "verdict": found.steps.verdict,
        "detectable": "" if math.isnan(found.detectable) else f"{found.detectable:.2f}",
        "seconds": estimate(found.costs.seconds),
        "flops": "" if math.isnan(found.costs.flops.mean) else estimate(found.costs.flops),
        "gap": estimate(found.final, 3, "+") + unit,
    }


def tuning(tunings: Sequence[Tuning]) -> Table:
    """Return the final loss of each arm at each learning rate of its grid."""
    rates = sorted({rate for tuning in tunings for rate in tuning.learning_rates})
    rows: list[list[Cell]] = []
    for tuning in tunings:
        finals = dict(zip(tuning.learning_rates, tuning.final_nats, strict=True))
        shown = {rate: f"{nats:.3f}" if math.isfinite(nats) else "diverged" for rate, nats in finals.items()}
        best = "none" if math.isnan(tuning.best) else f"{tuning.best:g}{' (edge)' * tuning.at_edge}"
        rows.append([tuning.arm, *(shown.get(rate, "") for rate in rates), best])
    return Table(["encoding", *(f"{rate:g}" for rate in rates), "best"], rows)


def sensitivity(sensitivities: Sequence[Sensitivity], treatment: str) -> Table:
    """Return the treatment's speed-up at each shared learning rate, and with each arm at its own best."""
    rates = sorted({rate for row in sensitivities for rate in row.learning_rates})
    rows: list[list[Cell]] = []
    for row in sensitivities:
        speedups = dict(zip(row.learning_rates, row.shared, strict=True))
        shown = {rate: estimate(speedup) if speedup else "diverged" for rate, speedup in speedups.items()}
        tuned = estimate(row.tuned) if row.tuned else ""
        rows.append([f"over {row.baseline}", *(shown.get(rate, "") for rate in rates), tuned])
    heads = [
        f"speed-up of {treatment} (tuning seeds)",
        *(f"both at {rate:g}" for rate in rates),
        "each at its own best",
    ]
    return Table(heads, rows)


def runs(findings: Findings) -> Table:
    """Return every run with its status."""
    return Table(
        ["sweep", "arm", "status", "step", "seeds", "peak learning rates", "hours", "reason"],
        [
            [
                sweep.name,
                run.arm,
                run.status["status"],
                str(run.status.get("step", "")),
                ", ".join(map(str, run.seeds)),
                ", ".join(f"{rate:g}" for rate in run.learning_rates),
                f"{run.hours:.2f}",
                run.status.get("why", ""),
            ]
            for sweep, run in findings.runs
        ],
    )


def write(findings: Findings, out: Path) -> None:
    """Write table.csv and table.tex with all arms, and claims.csv and claims.tex if there are claims."""
    heads = [head.format(treatment=findings.treatment) for head in COLUMNS.values()]
    rows = []
    for comparison in findings.comparisons:
        where = f"{comparison.sweep.setting}/" if comparison.sweep.setting else ""
        rows += [[f"{where}{row[0]}", *row[1:]] for row in numbers(comparison).rows]
    _write(Table(heads, rows), out / "table")
    if findings.claims:
        _write(claims(findings.claims), out / "claims")


def _write(table: Table, path: Path) -> None:
    rows = [table.heads, *table.lines]
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    heads, *lines = map(_tex, rows)
    lines = [r"\begin{tabular}{l" + "r" * (len(table.heads) - 1) + "}", r"\toprule", heads, r"\midrule", *lines]
    path.with_suffix(".tex").write_text("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n", encoding="utf-8")


def _tex(row: Sequence[str]) -> str:
    special = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"≥": r"$\geq$", "≤": r"$\leq$"}
    return " & ".join("".join(special.get(letter, letter) for letter in cell) for cell in row) + r" \\"
