"""Check run directories: sums of checkpoints, metrics, members, the batches that were consumed, versions."""

from pathlib import Path

from scripts import entry

EXAMPLES = """examples:
  python -m scripts.verify runs/a
  python -m scripts.verify runs/quick              every run in the folder of a sweep

A line for each thing that is wrong and for each note (another version, a text that is not here), then one for the run.
The batches are read and hashed again, a few thousand steps in a second.
exit status: 0 nothing is wrong, 1 something is, 2 a mistake in the command."""


def main() -> int:
    parser = entry.parser("verify", __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, help="the --workdir of a run or of a sweep")
    arguments = parser.parse_args()
    from rope_lm.verification import verify

    wrong = 0
    for run in entry.workdirs(arguments.runs):
        findings = 0
        for finding in verify(run):
            print(f"{run}: {'wrong' if finding.wrong else 'note'}: {finding.text}")
            findings += finding.wrong
        print(f"{run}: {'nothing is wrong' if not findings else f'{findings} wrong'}")
        wrong += findings
    return 1 if wrong else 0


if __name__ == "__main__":
    entry.end(main)
