"""How often runs that were trained on a probe answer it, by the distance to where the answer stands."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.train --workdir=runs/a --config=configs/lm.py:data=probe:induction
  python -m scripts.probe runs/a
  python -m scripts.sweep --workdir=runs/probes --config=configs/ablation.py:probes[,data=probe:copy]
  python -m scripts.probe runs/probes --multiples=1,2       every run, in rows of the trained length and of twice it

The probes: copy and reverse (a random string, then it again, or backwards), induction (what followed a letter before
follows it again) and passkey (a number somewhere in filler, asked for at the end). The rows are ones that the run has
not seen. What is found, for every member, is written into probe.json of each run.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("probe", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, help="the --workdir of a run or of a sweep")
    parser.add_argument("--multiples", default="1", help="of the trained length, with commas (1)")
    parser.add_argument("--rows", type=int, default=256, help="rows to answer (256)")
    arguments = parser.parse_args()
    multiples = entry.multiples(arguments.multiples)
    if arguments.rows < 1:
        raise Refusal(f"--rows={arguments.rows}: must be at least 1")
    from rope_lm import probing, run_directory, trained

    console = Console()
    for workdir in entry.workdirs(arguments.runs):
        probing.check(workdir)
        trained.load(workdir).finite()  # what is wrong with the run itself is no finding
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
    table = Table("row, tokens", "distance", "answers", "right", "of each member", title=str(workdir))
    for made in found:
        every = list(zip(*made["accuracy"], strict=True))
        for (low, high), answers, right in zip(made["distances"], made["answers"], every, strict=True):
            table.add_row(str(made["length"]), f"{low} to {high}", f"{answers:,}", *_shares(right))
        guess = f"any (guessing: {made['guessing']:.0%})"
        table.add_row(str(made["length"]), guess, f"{sum(made['answers']):,}", *_shares(made["overall"]))
        table.add_section()
    for row in refused:
        table.add_row(f"{row['multiple']} x", "refused", "", "", row["why"])
    return table


def _shares(right: list[float]) -> tuple[str, str]:
    return f"{sum(right) / len(right):.1%}", " ".join(f"{each:.1%}" for each in right)


if __name__ == "__main__":
    entry.end(main)
