"""Write the report of sweeps or runs: index.html, summary.json, runs.json, table.csv, table.tex, figures/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/report.py`

import json
import shlex
from typing import Any

from rich import table
from rich.console import Console

from rope_lm.analysis import load_all, report, reproduction, tables
from rope_lm.analysis.findings import Findings, gather
from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.report runs/ablation --out=report/
  python -m scripts.report runs/quick results/tuning --out=report/ --against=results/quick/summary.json
  python -m scripts.report runs/replication runs/tuned runs/sizes --out=report/

A folder whose runs have several learning rates is a grid: its page shows how loss depends on the learning rate. Any
other folder is a comparison, within each of its settings if it has settings. The folder of a report can be given in
place of its runs.
exit status: 0, or 3 if --against was given and is not reproduced, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("report", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=entry.path, help="the --workdir of a sweep or of a run")
    parser.add_argument("--out", type=entry.path, required=True, help="the folder to write the report into")
    parser.add_argument("--treatment", default="rotary", help="the arm whose speed-up is measured (rotary)")
    parser.add_argument("--against", type=entry.path, help="the summary.json of an archived report to compare with")
    arguments = parser.parse_args()
    archived = _read(arguments.against) if arguments.against else None
    command = shlex.join(["python", "-m", "scripts.report", *sys.argv[1:]])
    out, console = arguments.out, Console()
    sweeps = [sweep for path in arguments.runs for sweep in load_all(path)]
    findings = gather(sweeps, arguments.treatment, command)
    try:
        summary = report.write(findings, out)
    except OSError as error:
        raise Refusal(f"--out={str(out)!r} cannot be written ({error.strerror}): choose another folder") from error
    for shown in _tables(findings):
        console.print(shown)
    for warning in findings.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    status = 0 if archived is None else _compare(summary, archived, console)
    console.print(f"the page: {out / 'index.html'}", highlight=False, soft_wrap=True)
    return status


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"--against={str(path)!r} cannot be read ({error}): give the summary.json of a report") from error


def _tables(findings: Findings) -> list[table.Table]:
    """Return the tables of arms, learning rates and claims for the console."""
    keys = ("arm", "final", "speedup", "verdict")
    shown = []
    for comparison in findings.comparisons:
        heads = [tables.COLUMNS[key].format(treatment=findings.treatment) for key in keys]
        cells = [tables.cells(comparison, arm) for arm in comparison]
        rows = [[row[key] for key in keys] for row in cells]
        shown.append(_rich(comparison.sweep.title, tables.Table(heads, rows)))
    shown += [_rich(part.sweep.title, tables.tuning(part.tunings)) for part in findings.sections if part.tunings]
    return shown + [_rich("claims", tables.claims(findings.claims))] * bool(findings.claims)


def _rich(title: str, content: tables.Table) -> table.Table:
    printed = table.Table(*content.heads, title=title, title_justify="left")
    for row in content.lines:
        printed.add_row(*row)
    return printed


def _compare(summary: dict[str, Any], archived: dict[str, Any], console: Console) -> int:
    rows = reproduction.check(summary, archived)
    differ = [row for row in rows if row.agrees is False]
    compared = sum(row.agrees is not None for row in rows)
    for row in differ:
        console.print(f"differs: {row.name}: archived {row.archived}, here {row.here}", highlight=False, markup=False)
    if compared < len(rows):
        console.print(f"{len(rows) - compared} rows were not compared, because the text differs", highlight=False)
    word = "[bold green]reproduced[/]" if reproduction.reproduced(rows) else "[bold red]not reproduced[/]"
    console.print(f"{word}: {compared - len(differ)} of {compared} comparisons with the archived results agree")
    return 0 if reproduction.reproduced(rows) else 3


if __name__ == "__main__":
    entry.end(main)
