#!/usr/bin/env bash
# Makes the locks (requirements*.txt) from requirements*.in, with hashes, for every platform and Python >= 3.11 at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools" && "$tools/bin/pip" --quiet install uv
for kind in "" -dev -cuda -tpu; do
  "$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
    --no-header "requirements$kind.in" --output-file "requirements$kind.txt" "$@"
done
