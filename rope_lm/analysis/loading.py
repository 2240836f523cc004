"""Sweeps and runs, read from run directories and from archives. Nothing in them is executed."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from rope_lm import migrate
from rope_lm.analysis import archive
from rope_lm.analysis.runs import Run, Sweep
from rope_lm.refusal import Refusal
from rope_lm.run_directory import read_json, read_rows

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
    """Return the sweep in a folder, or the sweeps of an archive, the folder of a report.

    The runs of an archive are in its runs.json. A learning-rate grid may also be given as a summary.json alone. Raises
    Refusal if there is none, or if a file is damaged.
    """
    root = Path(path)
    if folders := sorted({config.parent for config in root.rglob("config.json")}):
        plans = {folder: folder / "config.json" for folder in folders}
        for plan in sorted((root / "plan").rglob("*.json")):
            plans.setdefault(root / plan.relative_to(root / "plan").with_suffix(""), plan)
        runs = [_run(folder, root, plan) for folder, plan in plans.items()]
        return [Sweep(root.resolve().name, root, runs, _claims(root.resolve()), [])]
    if (archived := read_json(root / "runs.json")) is not None:
        return archive.unpack(archived, root)
    if not (summary := read_json(root / "summary.json")):
        raise Refusal(
            f"{str(root)!r} holds no run (no config.json in it or below): give the --workdir of a sweep or a run"
        )
    return [Sweep(root.resolve().name, root, [], {}, archive.tuning(summary, root))]


def _run(folder: Path, root: Path, plan: Path) -> Run:
    """Return the run in a folder of the sweep `root`. `plan` is its config, also if it was planned and never began."""
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
    return Run(folder, arm, migrate.config(config), migrate.manifest(manifest), status, rows, measured)


def _read(path: Path, writer: str, keys: Collection[str], missing: Any) -> Any:
    """Return the object in a file, or `missing` if there is no file. Raises Refusal if it lacks one of the keys."""
    if (value := read_json(path)) is None:
        return missing
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
        return archive.checked_claims(read_json(own), own)
    claims = archive.checked_claims(read_json(root.parent / "sweep.json"), root.parent / "sweep.json")
    return {name: claim | {"setting": ""} for name, claim in claims.items() if claim["setting"] == root.name}
