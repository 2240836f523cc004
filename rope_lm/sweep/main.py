"""The sweep itself: write the plan, measure, train, and list how each arm ended."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rope_lm import run_directory
from rope_lm.refusal import Refusal
from rope_lm.signals import STOPPED
from rope_lm.sweep import tables
from rope_lm.sweep.arms import Config, date_claims, digest, setting, steps_left
from rope_lm.sweep.pool import MISTAKE, Local

LAUNCHERS = {"local": Local}  # where arms can train, by name


def sweep(arms: dict[str, Config], claims: Mapping[str, Any], root: Path, launcher: Local) -> int:
    """Train every arm in root/ARM and list how each ended; return an exit status.

    First a step of each setting is timed, to estimate how long the sweep takes. sweep.json keeps these times, and the
    time at which each claim was first seen: a report marks claims that were added or changed after their runs began.
    """
    try:
        for arm, config in arms.items():
            path = root / "plan" / f"{arm}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config, indent=2) + "\n")
        before = _read(root)
        claims = date_claims(claims, before["claims"])
        run_directory.write_json(root / "sweep.json", before | {"claims": claims, "argv": sys.argv})
        try:
            measured = _measure(arms, root, before["seconds_per_step"], launcher)
        except KeyboardInterrupt:
            return _end(root, dict.fromkeys(arms, STOPPED))
        # Read again: another sweep may have begun with other arms of the same folder.
        now = _read(root)
        steps = now["seconds_per_step"] | measured
        run_directory.write_json(root / "sweep.json", now | {"seconds_per_step": steps})
    except OSError as error:
        raise Refusal(f"workdir {str(root)!r} cannot be written ({error.strerror}): choose another") from error
    seconds = {name: entry["seconds"] for name, entry in (before["seconds_per_step"] | measured).items()}
    return _end(root, launcher.train(list(arms), tables.show_time(root, arms, seconds, launcher.at_once)))


def _end(root: Path, codes: Mapping[str, int]) -> int:
    """List how each arm ended, and return the exit status of the sweep. `codes` are those of the arms."""
    tables.show_end(root, {arm: "refused" if code == MISTAKE else "" for arm, code in codes.items()})
    if STOPPED in codes.values():
        print("stopped: run the same command again to go on", file=sys.stderr)
        return STOPPED
    return 1 if any(codes.values()) else 0


def _read(root: Path) -> dict[str, Any]:
    return {"claims": {}, "seconds_per_step": {}} | (run_directory.read_json(root / "sweep.json") or {})


def _measure(
    arms: dict[str, Config], root: Path, known: Mapping[str, Any], launcher: Local
) -> dict[str, dict[str, Any]]:
    """Time a step of one arm in each setting that has steps left, unless its time is `known`; return the new times."""
    measured = {}
    first = {setting(arm): arm for arm in reversed(arms) if steps_left(root, arm, arms[arm])}
    for name, arm in first.items():
        of = digest(arms[arm], launcher.at_once)
        if not (name in known and known[name]["of"] == of and known[name]["seconds"]):
            # 0 if the arm cannot begin: the reason is printed when its turn comes.
            measured[name] = {"of": of, "arm": arm, "seconds": launcher.measure(arm)}
    return measured
