"""Evaluate runs on texts longer than those that they were trained on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/extrapolate.py`

from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from rope_lm.refusal import Refusal, unknown
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.extrapolate runs/quick                         every run in the folder of a sweep
  python -m scripts.extrapolate runs/a --multiples=1,2,4 --scalings=yarn
  python -m scripts.report runs/quick --out=report/                with two more figures

The same validation text is read in pieces of 1, 2, 4 and 8 times the trained length: once in pieces that do not overlap
(apart), and once in windows that do (sliding), so that every token has a long context. A rotary run is also read with
scaled rotary (rotary_linear, rotary_ntk, yarn), by the factor by which the text is longer, without training. Results
are written to extrapolation.json in each run's folder.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("extrapolate", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=entry.path, help="the --workdir of a run or of a sweep")
    parser.add_argument(
        "--multiples", default="1,2,4,8", help="lengths to read, in trained lengths, with commas (1,2,4,8)"
    )
    parser.add_argument("--scalings", help="scalings of rotary, with commas; empty for none (all)")
    parser.add_argument("--rows", type=int, default=16, help="number of pieces of the longest length (16)")
    arguments = parser.parse_args()
    multiples = entry.multiples(arguments.multiples)
    if any(max(multiples) % multiple for multiple in multiples):
        raise Refusal(f"--multiples={arguments.multiples}: each must divide the greatest, so that all read one text")
    if arguments.rows < 1:
        raise Refusal(f"--rows={arguments.rows}: must be at least 1")
    from rope_lm import extrapolation, run_directory, trained

    names = list(extrapolation.SCALINGS) if arguments.scalings is None else arguments.scalings.split(",")
    for name in filter(None, names):
        if name not in extrapolation.SCALINGS:
            raise unknown("--scalings", name, extrapolation.SCALINGS)
    console = Console()
    for workdir in entry.workdirs(arguments.runs):
        config = extrapolation.check(workdir)
        trained.load(workdir).finite()  # an error of the run itself is not a result
        text = trained.text(workdir, arguments.rows, max(multiples))
        rotary = config["model"]["position"]["name"] == "rotary"
        found, refused = [], []
        for scaling in ["", *filter(None, names if rotary else ())]:
            for multiple in (multiple for multiple in multiples if multiple > 1 or not scaling):
                try:
                    found.append(extrapolation.measure(workdir, text, multiple, scaling))
                except Refusal as refusal:
                    refused.append({"multiple": multiple, "scaling": scaling, "why": str(refusal)})
        results = {"schema": 1, "length": config["data"]["length"], "rows": found, "refused": refused}
        run_directory.write_json(workdir / "extrapolation.json", results)
        console.print(_table(str(workdir), results))
    return 0


def _table(name: str, results: dict[str, Any]) -> Table:
    table = Table("length", "scaling", "apart, nats", "sliding, nats", title=name)
    for row in results["rows"]:
        length = f"{row['multiple']} x {results['length']}"
        table.add_row(length, row["scaling"], f"{mean(row['apart']):.3f}", f"{mean(row['sliding']):.3f}")
    for row in results["refused"]:
        table.add_row(f"{row['multiple']} x {results['length']}", row["scaling"], "refused", row["why"])
    return table


if __name__ == "__main__":
    entry.end(main)
