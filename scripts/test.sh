#!/usr/bin/env bash
# Set up .venv and run the tests, one process on each of at most four cores. Other arguments go to pytest:
#   scripts/test.sh                        the default tests; the last line says which were left to --all
#   scripts/test.sh --all                  every test
#   scripts/test.sh tests/positional -x -n0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev
PYTHONNOUSERSITE=1 exec .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=worksteal "$@"
