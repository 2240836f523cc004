"""Measure how far trained runs look: attention by distance, per layer and head, on validation text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/distance.py`

import numpy as np
from rich.console import Console
from rich.table import Table

from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.distance runs/quick
  python -m scripts.distance runs/replication/masked-softmax --rows=64

Writes distance.json to each run's folder, for the report. Only queries in the second half of the rows count, so that
each can look back at least half of the trained length.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("distance", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=entry.path, help="the --workdir of a run or of a sweep")
    parser.add_argument("--rows", type=int, default=32, help="number of rows of validation text (32)")
    arguments = parser.parse_args()
    if arguments.rows < 1:
        raise Refusal(f"--rows={arguments.rows}: must be at least 1")
    from rope_lm import distance, run_directory

    console = Console()
    for workdir in entry.workdirs(arguments.runs):
        found = distance.measure(workdir, arguments.rows)
        run_directory.write_json(workdir / "distance.json", found)
        console.print(_table(str(workdir), np.mean(found["mean"], axis=0)))
    return 0


def _table(name: str, mean: np.ndarray) -> Table:
    table = Table("layer", *(f"head {head}" for head in range(mean.shape[1])), title=f"{name}: mean distance, tokens")
    for layer, row in enumerate(mean):
        table.add_row(str(layer), *(f"{value:.1f}" for value in row))
    return table


if __name__ == "__main__":
    entry.end(main)
