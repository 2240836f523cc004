"""The report: summary.json, tables, figures and one self-contained page, from sweeps alone."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from rope_lm.analysis import figures
from rope_lm.analysis.comparison import Arm, Tuning, compare, tune, unfair
from rope_lm.analysis.published import FINDINGS
from rope_lm.analysis.runs import Run, Sweep

COLUMNS = {
    "arm": "encoding",
    "final": "final loss, nats/token [95%]",
    "bits": "bits/byte",
    "target": "steps to its own final loss",
    "treated": "steps of {treatment} to it",
    "speedup": "speed-up of {treatment} [95%]",
    "p": "p (Holm)",
    "verdict": "{treatment} faster?",
    "tokens": "tokens/s",
    "overhead": "time over none",
    "parameters": "parameters (its own)",
    "rate": "peak rate",
}


def write(sweeps: Sequence[Sweep], out: Path, treatment: str, command: str) -> dict[str, Any]:
    """Writes the report into the folder `out` and returns the summary."""
    comparisons = [(sweep, compare(sweep, treatment)) for sweep in sweeps if not sweep.grid]
    tunings = [tuning for sweep in sweeps if sweep.grid for tuning in tune(sweep)]
    out.mkdir(parents=True, exist_ok=True)
    drawings = _draw(comparisons, tunings, treatment, out / "figures")
    made = summary(sweeps, comparisons, tunings, treatment, command)
    (out / "summary.json").write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    arms = [arm for _, each in comparisons for arm in each]
    _tables(arms, treatment, out)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("rope_lm.analysis", "."), autoescape=True)
    page = environment.get_template("page.html").render(
        summary=made,
        treatment=treatment,
        comparisons=[(sweep, each, [table_row(arm) for arm in each]) for sweep, each in comparisons],
        columns={key: text.format(treatment=treatment) for key, text in COLUMNS.items()},
        tunings=tunings,
        figures=drawings,
        findings=FINDINGS,
        methods=[_methods(sweep.runs) for sweep, _ in comparisons if sweep.runs],
        sentence=sentence,
        command=command,
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    return made


def _draw(comparisons: Sequence, tunings: Sequence[Tuning], treatment: str, folder: Path) -> dict[str, str]:
    """Writes the figures that the data allows; returns their SVG by name, to stand in the page."""
    folder.mkdir(exist_ok=True)
    wanted = {}
    for sweep, arms in comparisons:
        name = "" if len(comparisons) == 1 else f"{sweep.name}-"
        if arms:
            wanted[f"{name}loss"] = figures.loss_curves(arms)
        if any(arm.speedup for arm in arms):
            wanted[f"{name}speedup"] = figures.speedups(arms, treatment)
            wanted[f"{name}profile"] = figures.profile(arms, treatment)
        if read := [run for run in sweep.runs if run.beyond["rows"]]:
            wanted[f"{name}beyond"] = figures.beyond(read)
            wanted[f"{name}position"] = figures.by_position(read)
    if tunings:
        wanted["tuning"] = figures.sensitivity(tunings)
    drawings = {}
    for name, figure in wanted.items():
        figures.save(figure, folder / name)
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        # Ids are made unique, since the drawings share one page.
        svg = svg[svg.index("<svg") :].replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
        drawings[name] = svg.replace('xlink:href="#', f'xlink:href="#{name}-')
    return drawings


def summary(
    sweeps: Sequence[Sweep], comparisons: Sequence, tunings: Sequence[Tuning], treatment: str, command: str
) -> dict[str, Any]:
    """Everything on the page, as data; a number that does not exist is null."""
    runs = [(sweep, run) for sweep in sweeps for run in sweep.runs]
    first = next((run.manifest for _, run in sorted(runs, key=lambda each: each[0].grid)), {})
    value = {
        "schema": 1,
        "command": command,
        "treatment": treatment,
        "arms": [_arm(sweep, arm, treatment) for sweep, arms in comparisons for arm in arms],
        "tuning": [
            {"arm": t.arm, "best": t.best, "rates": t.rates, "final_nats": t.finals, "seeds": t.seeds} for t in tunings
        ],
        "fingerprint": first.get("data", {}).get("fingerprint", {}),
        "device": first.get("device", {}),
        "versions": first.get("versions", {}),
        "warnings": [text for sweep, _ in comparisons for text in unfair(sweep)],
        "runs": [
            {
                "sweep": sweep.name,
                "arm": run.arm,
                "status": run.status["status"],
                "step": run.status.get("step"),
                "why": run.status.get("why", ""),
                "seeds": sorted({member["seed"] for member in run.manifest["members"]}),
                "rates": run.rates,
                "commit": run.manifest.get("commit", ""),
            }
            for sweep, run in runs
        ],
    }
    return json.loads(json.dumps(_finite(value)))  # numpy's numbers become Python's


def _arm(sweep: Sweep, arm: Arm, treatment: str) -> dict[str, Any]:
    run, over = arm.run, arm.speedup
    return {
        "sweep": sweep.name,
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
        "beyond": [
            {key: row[key] for key in ("multiple", "scaling", "seeds", "apart", "sliding")}
            for row in run.beyond["rows"]
        ],
        "steps_to_target": {"target": arm.target, "own": arm.steps, treatment: arm.treated_steps},
        f"speedup_of_{treatment}": over
        and {
            "mean": over.mean,
            "low": over.low,
            "high": over.high,
            "p": over.p,
            "p_holm": arm.p_holm,
            "verdict": over.verdict,
            "target": over.target,
            "n": over.n,
            "bound": over.bound,
            "in_seconds": arm.seconds_speedup,
        },
        "profile": [{key: getattr(s, key) for key in ("target", "mean", "low", "high", "bound")} for s in arm.profile],
        "tokens_per_second": run.tokens_per_second,
        "overhead": arm.overhead,
        "parameters": run.manifest["parameters"],
        "parameters_position": run.manifest["parameters_position"],
    }


def table_row(arm: Arm) -> dict[str, str]:
    """The cells of an arm's row, by the keys of COLUMNS."""
    over, run = arm.speedup, arm.run
    return {
        "arm": arm.name,
        "final": estimate(arm.final, 3),
        "bits": f"{arm.bits_per_byte:.3f}",
        "target": f"{arm.steps:,.0f}",
        "treated": f"{arm.treated_steps:,.0f}" if over else "",
        "speedup": estimate(over, 2) if over else "",
        "p": f"{over.p:.3g} ({arm.p_holm:.3g})" if over else "",
        "verdict": over.verdict if over else "",
        "tokens": f"{run.tokens_per_second:,.0f}",
        "overhead": "" if math.isnan(arm.overhead) or run.encoding == "none" else f"{100 * arm.overhead:+.1f}%",
        "parameters": f"{run.manifest['parameters']:,} ({run.manifest['parameters_position']:,})",
        "rate": f"{run.rates[0]:g}",
    }


def estimate(value: Any, digits: int) -> str:
    """A mean with its interval; the mean alone where there is no interval (one seed)."""
    if math.isnan(value.low):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def sentence(arm: Arm, treatment: str) -> str:
    """The verdict over one baseline, in words."""
    s = arm.speedup
    budget = arm.run.steps
    end = {
        "supported": f"{treatment} converges faster than {arm.name}",
        "refuted": f"{treatment} converges more slowly than {arm.name}",
        "inconclusive": f"whether {treatment} converges faster than {arm.name} is open",
    }[s.verdict]
    limits = {
        "": "",
        "lower": f" Where {arm.name} did not reach it, its {budget:,} steps were counted: this is a lower bound.",
        "upper": f" {treatment} did not always reach the target: this is an upper bound.",
        "unknown": " Neither arm always reached the target: little can be said.",
    }[s.bound]
    if math.isnan(s.low):
        return f"{end}: {s.mean:.2f} times the speed to a loss of {s.target:.3f}, one seed and so no interval.{limits}"
    return (
        f"{end}: {s.mean:.2f} times the speed (95% interval {s.low:.2f} to {s.high:.2f}, {s.n} seeds) to a loss of "
        f"{s.target:.3f} nats per token.{limits}"
    )


def _tables(arms: Sequence[Arm], treatment: str, out: Path) -> None:
    heads = [text.format(treatment=treatment) for text in COLUMNS.values()]
    rows = [[table_row(arm)[key] for key in COLUMNS] for arm in arms]
    with open(out / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *rows])
    lines = [r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}", r"\toprule", _tex(heads), r"\midrule"]
    lines += [*map(_tex, rows), r"\bottomrule", r"\end{tabular}"]
    (out / "table.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tex(cells: Sequence[str]) -> str:
    special = {each: f"\\{each}" for each in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    return " & ".join("".join(special.get(letter, letter) for letter in cell) for cell in cells) + r" \\"


def _methods(runs: Sequence[Run]) -> dict[str, Any]:
    """What a methods section needs, from the manifest of the first run."""
    run = next((run for run in runs if run.finished), runs[0])
    manifest, config = run.manifest, run.config
    seconds = sum(curve.seconds[-1] for each in runs for curve in each.curves[:1])
    return {"run": run, "manifest": manifest, "config": config, "hours": seconds / 3600, "runs": len(runs)}


def _finite(value: Any) -> Any:
    """The same data with null for what is no number."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
