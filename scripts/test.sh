#!/usr/bin/env bash
# Sets up .venv and runs every test; arguments go to pytest: scripts/test.sh tests/positional -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev
PYTHONNOUSERSITE=1 exec .venv/bin/python -m pytest "$@"
