"""Check run directories: checksums of checkpoints, metrics, members, the batches that were consumed, versions."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/verify.py`

from scripts import entry

EXAMPLES = """examples:
  python -m scripts.verify runs/a
  python -m scripts.verify runs/quick              every run in the folder of a sweep

Prints a line for each error and each note (another version, a text that is not here), then one for the run. The batches
are read and hashed again, a few thousand steps per second.
exit status: 0 nothing is wrong, 1 something is, 2 a mistake in the command."""


def main() -> int:
    parser = entry.parser("verify", __doc__ or "", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=entry.path, help="the --workdir of a run or of a sweep")
    arguments = parser.parse_args()
    from rope_lm.verification import verify

    total = 0
    for workdir in entry.workdirs(arguments.runs):
        wrong = 0
        for finding in verify(workdir):
            print(f"{workdir}: {'wrong' if finding.wrong else 'note'}: {finding.text}")
            wrong += finding.wrong
        print(f"{workdir}: {f'{wrong} wrong' if wrong else 'nothing is wrong'}")
        total += wrong
    return 1 if total else 0


if __name__ == "__main__":
    entry.end(main)
