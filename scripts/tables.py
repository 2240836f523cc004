"""Write the tables of README.md and docs/ again, from the archives in results/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/tables.py`

from rope_lm.analysis import documents
from scripts import entry

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  python -m scripts.tables             rewrite every table whose archive has changed
  python -m scripts.tables --check     change nothing; say which pages are out of date

A table stands between <!-- table: NAME --> and <!-- end -->. The names are in rope_lm/analysis/documents.py.
exit status: 0, or 1 if --check finds a page out of date, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("tables", __doc__, EXAMPLES)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if a page would change")
    arguments = parser.parse_args()
    stale = False
    for page in documents.pages(ROOT):
        text = page.read_text(encoding="utf-8")
        fresh = documents.fill(text, ROOT)
        if fresh == text:
            continue
        stale = True
        if arguments.check:
            print(f"{page.relative_to(ROOT)} is out of date: run python -m scripts.tables")
        else:
            page.write_text(fresh, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} rewritten")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    entry.end(main)
