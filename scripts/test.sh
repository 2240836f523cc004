#!/usr/bin/env bash
# Sets up .venv and runs every test, a process on each of at most four cores; arguments go to pytest:
#   scripts/test.sh tests/positional -x -n0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev
PYTHONNOUSERSITE=1 exec .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=worksteal "$@"
