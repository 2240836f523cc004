"""Make the report of one or several sweeps or runs: index.html, summary.json, table.csv, table.tex, figures/."""

import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rope_lm.analysis import load_all, report, reproduction
from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.report runs/ablation --out=report/
  python -m scripts.report runs/quick results/tuning --out=report/ --against=results/quick/summary.json
  python -m scripts.report runs/replication runs/tuned runs/sizes --out=report/

A folder whose runs have several learning rates is a grid, and gives the figure of learning rates; any other folder is a
comparison, within each of its settings if it has some. The folder of a report stands for its runs (runs.json).
exit status: 0, or 3 if --against was given and is not reproduced, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("report", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", help="the --workdir of a sweep or of a run")
    parser.add_argument("--out", required=True, help="the folder that the report is written into")
    parser.add_argument("--treatment", default="rotary", help="the arm whose speed-up is asked for (rotary)")
    parser.add_argument("--against", help="the summary.json of an archived report, to hold this one against")
    arguments = parser.parse_args()
    archived = _read(arguments.against) if arguments.against else None
    command = shlex.join(["python", "-m", "scripts.report", *sys.argv[1:]])
    out = Path(arguments.out)
    try:
        sweeps = [sweep for path in arguments.runs for sweep in load_all(path)]
        summary = report.write(sweeps, out, arguments.treatment, command)
    except OSError as error:
        raise Refusal(f"--out={arguments.out!r} cannot be written ({error.strerror}): choose another folder") from error
    console = Console()
    if summary["arms"] or not summary["tuning"]:
        console.print(_verdicts(summary, arguments.treatment))
    if summary["tuning"]:
        console.print(_rates(summary))
    if summary["claims"]:
        console.print(_claims(summary))
    for warning in summary["warnings"]:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    status = 0 if archived is None else _hold(summary, archived, console)
    console.print(f"the page: {out / 'index.html'}", highlight=False, soft_wrap=True)
    return status


def _read(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"--against={path!r} cannot be read ({error}): give the summary.json of a report") from error


def _verdicts(summary: dict, treatment: str) -> Table:
    several = len({arm["setting"] for arm in summary["arms"]}) > 1
    table = Table(*["setting"] * several, "encoding", "final nats/token", f"speed-up of {treatment} [95%]", "faster?")
    before = None
    for arm in summary["arms"]:
        if arm["setting"] != before:
            table.add_section()
        setting = [arm["setting"] if arm["setting"] != before else ""] * several
        over = arm[f"speedup_of_{treatment}"] or {"verdict": ""}
        before = arm["setting"]
        table.add_row(*setting, arm["arm"], f"{arm['final_nats']['mean']:.3f}", _estimate(over, 2), over["verdict"])
    return table


def _rates(summary: dict) -> Table:
    several = len({tuning["setting"] for tuning in summary["tuning"]}) > 1
    table = Table(*["setting"] * several, "encoding", "best peak rate", "final nats/token at each rate")
    for tuning in summary["tuning"]:
        finals = zip(tuning["rates"], tuning["final_nats"], strict=True)
        shown = ", ".join(f"{rate:g}: " + ("diverged" if nats is None else f"{nats:.3f}") for rate, nats in finals)
        table.add_row(*[tuning["setting"]] * several, tuning["arm"], f"{tuning['best']:g}", shown)
    return table


def _estimate(value: dict, digits: int) -> str:
    numbers = [f"{value[key]:.{digits}f}" for key in ("mean", "low", "high") if value.get(key) is not None]
    bound = report.BOUNDS[value.get("bound", "")]
    return "" if not numbers else bound + numbers[0] + (f" [{', '.join(numbers[1:])}]" if numbers[1:] else "")


def _claims(summary: dict) -> Table:
    table = Table("claim", "setting", "measured [95%]", "verdict")
    for made in summary["claims"]:
        late = " (added after its runs began)" if made["late"] else ""
        shown = _estimate(made, 3 if made["claim"]["outcome"] == "final" else 2)
        table.add_row(made["sentence"], made["claim"]["setting"], shown, made["verdict"] + late)
    return table


def _hold(summary: dict, archived: dict, console: Console) -> int:
    rows = reproduction.hold(summary, archived)
    differ = [row for row in rows if row.agrees is False]
    compared = sum(row.agrees is not None for row in rows)
    for row in differ:
        console.print(f"differs: {row.what}: archived {row.archived}, here {row.here}", highlight=False, markup=False)
    if compared < len(rows):
        console.print(f"{len(rows) - compared} rows were not compared: the text is another one", highlight=False)
    word = "[bold green]reproduced[/]" if reproduction.reproduced(rows) else "[bold red]not reproduced[/]"
    console.print(f"{word}: {compared - len(differ)} of {compared} comparisons with the archived results agree")
    return 0 if reproduction.reproduced(rows) else 3


if __name__ == "__main__":
    entry.end(main)
