"""Archives: the runs behind a report in one small file (runs.json), which is read as their directories are."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rope_lm import migrate
from rope_lm.analysis.runs import Run, Sweep
from rope_lm.refusal import Refusal

SCHEMA = 2
CURVES = ("step", "nats", "seconds")
CLAIM = {"treatment", "baseline", "setting", "outcome", "relation", "threshold", "source", "published", "since"}
TUNING = ("arm", "setting", "learning_rates", "final_nats", "seeds")
# Entries of a manifest that do not affect results or comparability, and may name a person's machine.
PRIVATE = ("argv", "overrides", "host", "segments", "xla_flags", "glibc_tunables")


def pack(sweeps: Sequence[Sweep]) -> dict[str, Any]:
    """Return an archive of the sweeps, comparisons and learning-rate grids alike.

    Of each run it holds the config, the manifest, the validation curves, and what was measured afterwards: losses per
    document, losses beyond the trained length, attention by distance.
    """
    packed = [
        {"name": sweep.name, "claims": sweep.claims, "tuning": sweep.tuning, "runs": [_pack(run) for run in sweep.runs]}
        for sweep in sweeps
    ]
    return {"schema": SCHEMA, "sweeps": packed}


def _pack(run: Run) -> dict[str, Any]:
    rows = [row for row in run.rows if row["split"] == "validation"]
    manifest = {key: value for key, value in run.manifest.items() if key not in PRIVATE}
    segments = [
        {"time": segment["time"], "changed": {k: v for k, v in segment.get("changed", {}).items() if k == "steps"}}
        for segment in run.manifest.get("segments", [])
    ]
    return {
        "arm": run.arm,
        "config": run.config,
        "manifest": manifest | {"segments": segments},
        "status": run.status,
        "tokens_per_second": None if math.isnan(run.tokens_per_second) else run.tokens_per_second,
        "member": [row["member"] for row in rows],
        **{key: [row[key] for row in rows] for key in CURVES},
        "measured": run.measured,
    }


def unpack(value: Any, root: Path) -> list[Sweep]:
    """Return the sweeps of an archive in the folder `root`. Raises Refusal if it is damaged, or of a later version."""
    path = root / "runs.json"
    try:
        if value["schema"] > SCHEMA:
            raise Refusal(
                f"{path} has schema {value['schema']}, this version reads up to {SCHEMA}: use a later version"
            )
        return [
            Sweep(
                name=sweep["name"],
                path=root,
                runs=[_unpack(entry, root) for entry in sweep["runs"]],
                claims=checked_claims(sweep, path),
                tuning=sweep.get("tuning", []),
            )
            for sweep in value["sweeps"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Refusal(f"{path} is not an archive that a report wrote ({error!r}): write it again") from error


def _unpack(entry: dict[str, Any], root: Path) -> Run:
    rows: list[dict[str, Any]] = [
        {"split": "validation", "member": member} | dict(zip(CURVES, values, strict=True))
        for member, *values in zip(entry["member"], *(entry[key] for key in CURVES), strict=True)
    ]
    if speed := entry["tokens_per_second"]:
        rows.append({"split": "train", "step": entry["config"]["steps"], "nats": None, "tokens_per_second": speed})
    return Run(
        path=root,
        arm=entry["arm"],
        config=migrate.config(entry["config"]),
        manifest=migrate.manifest(entry["manifest"]),
        status=entry["status"],
        rows=rows,
        measured=entry.get("measured", {}),
    )


def tuning(summary: Any, root: Path) -> list[dict[str, Any]]:
    """Return the rows of the learning-rate grid in a summary.json. Raises Refusal if there are none."""
    try:
        if rows := [{key: row[key] for key in TUNING} for row in migrate.summary(summary)["tuning"]]:
            return rows
    except (KeyError, TypeError, AttributeError):
        pass
    raise Refusal(f"{root / 'summary.json'} holds no learning-rate grid of a report: give the folder of its runs")


def checked_claims(value: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Return the claims in the value of the file `path`. Raises Refusal for a claim that lacks a key."""
    claims = value.get("claims", {}) if isinstance(value, dict) else {}
    for name, claim in claims.items() if isinstance(claims, dict) else [("claims", claims)]:
        if not isinstance(claim, dict) or not claim.keys() >= CLAIM:
            raise Refusal(f"{path}: claim {name!r} lacks one of {', '.join(sorted(CLAIM))}")
    return claims
