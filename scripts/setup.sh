#!/usr/bin/env bash
# Makes .venv in the checkout and installs the exact, hashed lock into it. The second time takes a second.
#   scripts/setup.sh        what training needs: for an NVIDIA GPU or a TPU where one is found, else for the CPU
#   scripts/setup.sh dev    and what the tests need
set -euo pipefail
case ${1:-} in
  "" | dev) ;;
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
  *) echo "error: $1: give nothing, or dev; see --help" >&2 && exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

fail() { echo "error: $*" >&2; exit 1; }

lock=requirements.txt
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  lock=requirements-cuda.txt
elif compgen -G "/dev/accel*" >/dev/null || [ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}" ]; then
  lock=requirements-tpu.txt
fi
locks=("$lock")
[ "${1:-}" = dev ] && locks+=(requirements-dev.txt)

{ : >>.venv.lock; } 2>/dev/null || fail "$PWD/.venv.lock cannot be written by $(id -un): clone into a folder of your own"
# One set-up at a time; where there is no flock (macOS) two at once are not guarded against.
if command -v flock >/dev/null; then exec 9>.venv.lock; flock 9; fi

python=.venv/bin/python
# What is installed is not found, pip neither, where the Python that .venv was made with has become another version.
if ! "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  for found in python3 python3.14 python3.13 python3.12 python3.11; do
    "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    found=
  done
  [ -n "$found" ] || fail "no Python >= 3.11 on the PATH (python3 is $(python3 --version 2>&1 || true)): install one, from python.org or your system's packages"
  echo "setting up .venv with $("$found" --version)" >&2
  rm -rf .venv
  "$found" -m venv .venv >/dev/null || { rm -rf .venv; fail "$found cannot make a virtual environment: install its venv module (Debian and Ubuntu: apt install python3-venv)"; }
fi

for each in "${locks[@]}"; do
  sum=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$each")
  stamp=.venv/installed-$each
  [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ] && continue
  echo "installing $each into .venv (a minute or two, once)" >&2
  # Wheels alone, so that nothing needs a compiler; promise, which TFDS wants, is plain Python and has none.
  "$python" -m pip install --quiet --require-hashes --only-binary=:all: --no-binary=promise --use-pep517 --requirement "$each" 9>&- ||
    fail "pip could not install $each: see above; running this again goes on"
  echo "$sum" >"$stamp"
done
