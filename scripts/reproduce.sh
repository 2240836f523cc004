#!/usr/bin/env bash
# Trains five encodings x three seeds on text that is on every machine, and makes the report.
#   scripts/reproduce.sh                             about a quarter of an hour on two CPU cores
#   scripts/reproduce.sh --config.base.steps=200     arguments go to the sweep
#   WORKDIR=/elsewhere scripts/reproduce.sh          runs/quick is the default
# Stop it with Ctrl-C; the same command goes on without redoing what is finished.
set -euo pipefail
for word in "$@"; do
  case $word in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
done
case ${WORKDIR:-} in
  "") workdir=runs/quick ;; # in the checkout
  /*) workdir=$WORKDIR ;;
  "~" | "~/"*) workdir=$HOME${WORKDIR#"~"} ;;
  *) workdir=$PWD/$WORKDIR ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONNOUSERSITE=1
scripts/setup.sh
.venv/bin/python -m scripts.sweep --workdir="$workdir" --config=configs/ablation.py:quick "$@"
report=("$workdir")
[ -d results/tuning ] && report+=(results/tuning)
[ $# = 0 ] && [ -f results/quick/summary.json ] && report+=(--against=results/quick/summary.json)
.venv/bin/python -m scripts.report "${report[@]}" --out="$workdir/report" || [ $? = 3 ]
