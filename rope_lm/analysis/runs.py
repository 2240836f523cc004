"""Run directories, read as data: config, manifest, status, metrics. Nothing in them is executed."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rope_lm.refusal import Refusal


@dataclass(frozen=True)
class Curve:
    """The validation loss of one member of a run."""

    seed: int
    rate: float  # peak learning rate
    steps: np.ndarray  # [E], updates done at each evaluation, ascending
    nats: np.ndarray  # [E], per token; nan where it was not finite
    seconds: np.ndarray  # [E], of training, compiling left out

    @property
    def final(self) -> float:
        """Nats per token at the last evaluation."""
        return float(self.nats[-1]) if len(self.nats) else float("nan")


@dataclass(frozen=True)
class Run:
    """One run directory: an ensemble of members that share an encoding."""

    path: Path
    arm: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    status: dict[str, Any]
    rows: list[dict[str, Any]]
    beyond: dict[str, Any]  # what scripts.extrapolate found; no rows where it was not run

    @property
    def encoding(self) -> str:
        return self.config["model"]["position"]["name"]

    @property
    def steps(self) -> int:
        """The budget, in steps."""
        return self.config["steps"]

    @property
    def finished(self) -> bool:
        return self.status["status"] == "finished"

    @cached_property
    def curves(self) -> list[Curve]:
        """A curve for each member that has evaluations and did not diverge."""
        found = []
        for member in self.manifest["members"]:
            if str(member["member"]) in self.status.get("diverged", {}):
                continue
            rows = [row for row in self.rows if row["split"] == "validation" and row["member"] == member["member"]]
            columns = [np.array([row[key] for row in rows], float) for key in ("step", "nats", "seconds")]
            if rows:
                found.append(Curve(member["seed"], member["rate"], *columns))
        return found

    @property
    def rates(self) -> list[float]:
        return sorted({member["rate"] for member in self.manifest["members"]})

    @property
    def batches(self) -> dict[str, str]:
        """By seed, the sha256 over every batch that was consumed: equal for equal tokens in an equal order."""
        sums = self.manifest.get("batches", {}).get("sha256", [])
        return {str(member["seed"]): each for member, each in zip(self.manifest["members"], sums, strict=False)}

    @property
    def tokens_per_second(self) -> float:
        """Of all members together: the median over the intervals after the first quarter of the run."""
        values = [
            row["tokens_per_second"]
            for row in self.rows
            if row["split"] == "train" and row["member"] == 0 and row["step"] > self.steps / 4
        ]
        return float(np.median(values)) if values else float("nan")

    @property
    def tokens_per_step(self) -> int:
        """Of one member."""
        return self.config["data"]["batch"] * self.config["data"]["length"]


@dataclass(frozen=True)
class Sweep:
    """The runs of one folder, and whether they are a grid of learning rates or a comparison of arms."""

    name: str
    path: Path
    runs: list[Run]
    archive: dict[str, Any]  # the summary.json of a folder that holds a report instead of its runs

    @property
    def grid(self) -> bool:
        return any(len(run.rates) > 1 for run in self.runs) or bool(self.archive)


def load(path: str | Path) -> Sweep:
    """The sweep in a folder, or the single run, or the archived report of a grid of learning rates.

    Raises Refusal where there is none, or where a file is damaged.
    """
    root = Path(path)
    folders = sorted({config.parent for config in root.rglob("config.json")})
    archive = {} if folders else _json(root / "summary.json", {})
    if not folders and not (isinstance(archive, dict) and archive.get("tuning")):
        raise Refusal(
            f"{str(root)!r} holds no run (no config.json in it or below): give the --workdir of a sweep or a run"
        )
    return Sweep(root.resolve().name, root, [_load_run(folder, root) for folder in folders], archive)


def _load_run(folder: Path, root: Path) -> Run:
    arm = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    config, manifest = _json(folder / "config.json", {}), _json(folder / "manifest.json", {"members": []})
    status = _json(folder / "status.json", {"status": "not run", "why": "", "step": 0})
    for path, value, keys in [
        (folder / "config.json", config, ("steps", "data", "model", "optimizer")),
        (folder / "manifest.json", manifest, ("members",)),
        (folder / "status.json", status, ("status",)),
    ]:
        missing = [key for key in keys if not isinstance(value, dict) or key not in value]
        if missing:
            raise Refusal(f"{path} is not a run's (it lacks {', '.join(missing)}): move it away or repair it")
    beyond = _json(folder / "extrapolation.json", {"length": 0, "rows": []})
    if not isinstance(beyond, dict) or not {"length", "rows"} <= beyond.keys():
        raise Refusal(f"{folder / 'extrapolation.json'} is not what scripts.extrapolate writes: make it again")
    return Run(folder, arm, config, manifest, status, _rows(folder / "metrics.jsonl"), beyond)


def _json(path: Path, missing: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} cannot be read ({error}): it is damaged, or not a run's") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    """By step; a step that was done again after a resume counts once, as last written; a torn last line is no row."""
    found: dict[tuple, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found[row["split"], row["member"], row["step"]] = row
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise Refusal(f"{path} line {number} is not a row of metrics ({error}): it is damaged") from error
    return sorted(found.values(), key=lambda row: row["step"])
