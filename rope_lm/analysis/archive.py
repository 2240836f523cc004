"""Sweeps and runs, read from run directories and from archives. Files are read as plain data: no pickle, no eval.

An archive is the folder of a report. Its runs.json holds the runs behind the report and can be loaded in place of the
run directories.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rope_lm import migrate, settings
from rope_lm.analysis.runs import Run, Sweep
from rope_lm.refusal import Refusal
from rope_lm.run_directory import present, read_json, read_rows

SCHEMA = 2
CURVES = ("step", "nats", "seconds")
CLAIM = {"treatment", "baseline", "setting", "outcome", "relation", "threshold", "source", "published", "since"}
TUNING = ("arm", "setting", "learning_rates", "final_nats", "seeds")
# Entries of a manifest that do not affect results or comparability, and may name a person's machine.
PRIVATE = ("argv", "overrides", "host", "segments", "xla_flags", "glibc_tunables")
# What is measured of a finished run, by key of Run.measured: the file, who writes it, the keys that it must have.
MEASUREMENTS = {
    "extrapolation": ("extrapolation.json", "scripts.extrapolate", ("length", "rows")),
    "distance": ("distance.json", "scripts.distance", ("mass", "mean", "edges")),
    "documents": ("documents.json", "a run", ("tokens", "nats")),
}


def load(path: str | Path) -> Sweep:
    """Return the sweep of a folder, a setting (`runs/replication/causal-softmax`), a single run or an archive.

    Raises Refusal if there is none, if a file is damaged, or if an archive holds several sweeps.
    """
    sweeps = load_all(path)
    if len(sweeps) > 1:
        names = ", ".join(sweep.name for sweep in sweeps)
        raise Refusal(f"{str(path)!r} is the archive of several sweeps ({names}): use load_all")
    return sweeps[0]


def load_all(path: str | Path) -> list[Sweep]:
    """Return the sweep in a folder of runs, or all sweeps of an archive.

    A folder that holds only the summary.json of a learning-rate grid is accepted too, without its runs. Raises Refusal
    if the folder holds no sweep, or if a file is damaged.
    """
    root = settings.path(path, str(path))
    if folders := sorted({config.parent for config in root.rglob("config.json")}):
        plans = {folder: folder / "config.json" for folder in folders}
        for plan in sorted((root / "plan").rglob("*.json")):
            plans.setdefault(root / plan.relative_to(root / "plan").with_suffix(""), plan)
        runs = [_run(folder, root, plan) for folder, plan in plans.items()]
        return [Sweep(root.resolve().name, root, runs, _claims(root.resolve()), [])]
    if (archived := read_json(root / "runs.json")) is not None:
        return _unpack_all(archived, root)
    if not (summary := read_json(root / "summary.json")):
        raise Refusal(
            f"{str(root)!r} holds no run (no config.json in it or below): give the --workdir of a sweep or a run"
        )
    return [Sweep(root.resolve().name, root, [], {}, _tuning(summary, root))]


def _run(folder: Path, root: Path, plan: Path) -> Run:
    """Return the run in a folder of the sweep `root`. `plan` is its config file, which exists before the run begins."""
    arm = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    config = _read(plan, "a run", ("steps", "data", "model", "optimizer"), None)
    manifest = _read(folder / "manifest.json", "a run", ("members",), {"members": []})
    status = _read(folder / "status.json", "a run", ("status",), {"status": "not run", "why": "", "step": 0})
    rows = _last_written(read_rows(folder / "metrics.jsonl"))
    measured = {
        key: value
        for key, (name, writer, keys) in MEASUREMENTS.items()
        if (value := _read(folder / name, writer, keys, None)) is not None
    }
    return Run(
        path=folder,
        arm=arm,
        config=migrate.config(config),
        manifest=migrate.manifest(manifest),
        status=present(folder, status),
        rows=rows,
        measured=measured,
    )


def _read(path: Path, writer: str, keys: Collection[str], missing: Any) -> Any:
    """Return the JSON object in a file, or `missing` if there is no file. Raises Refusal if the object lacks a key."""
    if not path.exists():
        return missing
    value = read_json(path)
    if lacking := [key for key in keys if not isinstance(value, dict) or key not in value]:
        raise Refusal(f"{path} is not in the format that {writer} writes (no {', '.join(lacking)}): repair or move it")
    return value


def _last_written(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows by step; a step that was repeated after a resume counts once."""
    found = {(row["split"], row["member"], row["step"]): row for row in rows}
    return sorted(found.values(), key=lambda row: row["step"])


def _claims(root: Path) -> dict[str, dict[str, Any]]:
    """Return the claims about a sweep; for the folder of one of its settings, those about that setting."""
    if (own := root / "sweep.json").exists():
        return _checked_claims(read_json(own), own)
    claims = _checked_claims(read_json(root.parent / "sweep.json"), root.parent / "sweep.json")
    return {name: claim | {"setting": ""} for name, claim in claims.items() if claim["setting"] == root.name}


def pack(sweeps: Sequence[Sweep]) -> dict[str, Any]:
    """Return an archive of the sweeps, comparisons and learning-rate grids alike.

    For each run it holds the config, the manifest, the validation curves and any later measurements: losses per
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


def _unpack_all(value: Any, root: Path) -> list[Sweep]:
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
                claims=_checked_claims(sweep, path),
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


def _tuning(summary: Any, root: Path) -> list[dict[str, Any]]:
    """Return the rows of the learning-rate grid in a summary.json. Raises Refusal if there are none."""
    try:
        if rows := [{key: row[key] for key in TUNING} for row in migrate.summary(summary)["tuning"]]:
            return rows
    except (KeyError, TypeError, AttributeError):
        pass
    raise Refusal(f"{root / 'summary.json'} holds no learning-rate grid of a report: give the folder of its runs")


def _checked_claims(value: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Return the claims in the value of the file `path`. Raises Refusal for a claim that lacks a key."""
    claims = value.get("claims", {}) if isinstance(value, dict) else {}
    for name, claim in claims.items() if isinstance(claims, dict) else [("claims", claims)]:
        if not isinstance(claim, dict) or not claim.keys() >= CLAIM:
            raise Refusal(f"{path}: claim {name!r} lacks one of {', '.join(sorted(CLAIM))}")
    return claims
