"""Measure how often runs trained on a probe answer it, by distance."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/probe.py`

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.train --workdir=runs/a --config=configs/lm.py:data=probe:induction
  python -m scripts.probe runs/a
  python -m scripts.sweep --workdir=runs/probes --config=configs/ablation.py:probes[,data=probe:copy]
  python -m scripts.probe runs/probes --multiples=1,2       every run, in rows of the trained length and twice that

The probes: copy and reverse (a random string, then the same again, or backwards), induction (the letter that followed a
capital follows it again) and passkey (a number hidden in filler, asked for at the end). The distance is that from an
answer to the token that it repeats. The rows are new to the run. The results of every member are written to probe.json
in each run's folder.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("probe", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=entry.path, help="the --workdir of a run or of a sweep")
    parser.add_argument("--multiples", default="1", help="lengths of rows, in trained lengths, with commas (1)")
    parser.add_argument("--rows", type=int, default=256, help="number of rows (256)")
    arguments = parser.parse_args()
    multiples = entry.multiples(arguments.multiples)
    if arguments.rows < 1:
        raise Refusal(f"--rows={arguments.rows}: must be at least 1")
    from rope_lm import probing, run_directory, trained

    console = Console()
    for workdir in entry.workdirs(arguments.runs):
        probing.check(workdir)
        trained.load(workdir).finite()  # an error of the run itself is not a result
        found, refused = [], []
        for multiple in multiples:
            try:
                found.append(probing.measure(workdir, arguments.rows, multiple))
            except Refusal as refusal:
                if multiple == 1:
                    raise
                refused.append({"multiple": multiple, "why": str(refusal)})
        run_directory.write_json(workdir / "probe.json", {"schema": 1, "rows": found, "refused": refused})
        console.print(_table(workdir, found, refused))
    return 0


def _table(workdir: Path, found: list[dict], refused: list[dict]) -> Table:
    table = Table("row, tokens", "distance", "answers", "right", "per member", title=str(workdir))
    for result in found:
        members = list(zip(*result["accuracy"], strict=True))
        for (low, high), answers, right in zip(result["distances"], result["answers"], members, strict=True):
            table.add_row(str(result["length"]), f"{low} to {high}", f"{answers:,}", *_shares(right))
        guess = f"any (guessing: {result['guessing']:.0%})"
        table.add_row(str(result["length"]), guess, f"{sum(result['answers']):,}", *_shares(result["overall"]))
        table.add_section()
    for row in refused:
        table.add_row(f"{row['multiple']} x", "refused", "", "", row["why"])
    return table


def _shares(right: Sequence[float]) -> tuple[str, str]:
    return f"{sum(right) / len(right):.1%}", " ".join(f"{share:.1%}" for share in right)


if __name__ == "__main__":
    entry.end(main)
