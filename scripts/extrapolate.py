"""Evaluate runs beyond the length that they were trained on; the report draws what it finds."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rope_lm.refusal import Refusal, unknown
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.extrapolate runs/quick                         every run in the folder of a sweep
  python -m scripts.extrapolate runs/a --multiples=1,2,4 --scalings=yarn
  python -m scripts.report runs/quick --out=report/                with two figures more

The same validation text is read in pieces of 1, 2, 4, 8 times the trained length: pieces that do not overlap (apart),
and windows that do (sliding), so that early tokens of a piece are not credited to the encoding. A run with rotary is
read scaled too (rotary_linear, rotary_ntk, yarn, each by as much as the text is longer), without training. What is
found is written into extrapolation.json of each run.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("extrapolate", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, help="the --workdir of a run or of a sweep")
    parser.add_argument("--multiples", default="1,2,4,8", help="of the trained length (1,2,4,8)")
    parser.add_argument("--scalings", help="of rotary, with commas (all; give an empty one for none)")
    parser.add_argument("--rows", type=int, default=16, help="pieces of the longest length (16)")
    arguments = parser.parse_args()
    multiples = entry.multiples(arguments.multiples)
    if any(max(multiples) % each for each in multiples):
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
        trained.load(workdir).finite()  # what is wrong with the run itself is no finding
        text = trained.text(workdir, arguments.rows, max(multiples))
        rotary = config["model"]["position"]["name"] == "rotary"
        found, refused = [], []
        for scaling in ["", *filter(None, names if rotary else ())]:
            for multiple in multiples if not scaling else [each for each in multiples if each > 1]:
                try:
                    found.append(extrapolation.measure(workdir, text, multiple, scaling))
                except Refusal as refusal:
                    refused.append({"multiple": multiple, "scaling": scaling, "why": str(refusal)})
        made = {"schema": 1, "length": config["data"]["length"], "rows": found, "refused": refused}
        run_directory.write_json(workdir / "extrapolation.json", made)
        console.print(_table(str(workdir), made))
    return 0


def _table(name: str, made: dict) -> Table:
    table = Table("length", "scaling", "apart, nats", "sliding, nats", title=name)
    mean = lambda values: f"{sum(values) / len(values):.3f}"  # noqa: E731
    for row in made["rows"]:
        length = f"{row['multiple']} x {made['length']}"
        table.add_row(length, row["scaling"], mean(row["apart"]), mean(row["sliding"]))
    for row in made["refused"]:
        table.add_row(f"{row['multiple']} x {made['length']}", row["scaling"], "refused", row["why"])
    return table


if __name__ == "__main__":
    entry.end(main)
