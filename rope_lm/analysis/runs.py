"""Runs and sweeps as data: configs, manifests and loss curves."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rope_lm.refusal import Refusal


@dataclass(frozen=True)
class Curve:
    """The validation loss of one member of a run."""

    seed: int
    learning_rate: float  # peak
    steps: np.ndarray  # [E], updates done at each evaluation, ascending
    nats: np.ndarray  # [E], per token; nan if not finite, and at the end of a member that diverged
    seconds: np.ndarray  # [E], of training, without compilation

    @property
    def final(self) -> float:
        """Nats per token at the last evaluation."""
        return float(self.nats[-1])

    @property
    def area(self) -> float:
        """Mean loss over the steps, nats per token: the area under the finite part of the curve, per step."""
        finite = np.isfinite(self.nats)
        return float(np.trapezoid(self.nats[finite], self.steps[finite]) / (self.steps[-1] - self.steps[0]))


@dataclass(frozen=True)
class Run:
    """One run: an ensemble of members that share an encoding."""

    path: Path
    arm: str  # ARM or, in a sweep of several settings, SETTING/ARM
    config: dict[str, Any]
    manifest: dict[str, Any]
    status: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    measured: dict[str, Any]  # by key of MEASUREMENTS (archive.py); a key is absent if it was not measured

    @property
    def encoding(self) -> str:
        return self.config["model"]["position"]["name"]

    @property
    def objective(self) -> str:
        """causal or masked. Runs from before this key existed are causal."""
        return self.config.get("objective", {"name": "causal"})["name"]

    @property
    def attention(self) -> str:
        """softmax or performer. Runs from before this key existed use softmax."""
        return self.config["model"].get("attention", {"name": "softmax"})["name"]

    @property
    def kernel(self) -> str:
        """The attention kernel, as resolved when the run began."""
        return self.manifest.get("kernel") or self.manifest.get("execution", {}).get("kernel", "unknown")

    @property
    def steps(self) -> int:
        """The number of steps that the config asks for: the budget."""
        return self.config["steps"]

    @property
    def finished(self) -> bool:
        return self.status["status"] == "finished"

    @property
    def seeds(self) -> list[int]:
        return sorted({member["seed"] for member in self.manifest["members"]})

    @property
    def learning_rates(self) -> list[float]:
        return sorted({member["learning_rate"] for member in self.manifest["members"]})

    @property
    def curves(self) -> list[Curve]:
        """The curves of members that have evaluations, did not diverge and end at a finite loss."""
        return [curve for curve in self.members.values() if math.isfinite(curve.final)]

    @property
    def not_finite(self) -> list[int]:
        """The members that did not diverge and whose last evaluation was not finite."""
        diverged = self.status.get("diverged", {})
        return [i for i, curve in self.members.items() if not math.isfinite(curve.final) and str(i) not in diverged]

    @cached_property
    def members(self) -> dict[int, Curve]:
        """The curve of each member that has evaluations, by member number.

        The curve of a member that diverged is extended to the last step with nan, so losses that it had not reached
        before it diverged count as never reached.
        """
        curves = {}
        evaluations = [row for row in self.rows if row["split"] == "validation"]
        longest = max((row["seconds"] for row in evaluations), default=0.0)
        for member in self.manifest["members"]:
            rows = [row for row in evaluations if row["member"] == member["member"]]
            if rows and str(member["member"]) in self.status.get("diverged", {}):
                rows.append({"step": self.steps, "nats": None, "seconds": longest})
            columns = [np.array([row[key] for row in rows], float) for key in ("step", "nats", "seconds")]
            if rows:
                curves[member["member"]] = Curve(member["seed"], member["learning_rate"], *columns)
        return curves

    @property
    def batches(self) -> dict[str, str]:
        """The sha256 over all batches consumed, by seed. It is equal if and only if tokens and order are."""
        sums = self.manifest.get("batches", {}).get("sha256", [])
        members = [member for member in self.manifest["members"] if member["member"] < len(sums)]
        return {str(member["seed"]): sums[member["member"]] for member in members}

    @property
    def tokens_per_second(self) -> float:
        """Speed of all members together: the median over the intervals after the first quarter of the run."""
        values = {  # by step, because every member has a row; one that diverged has none
            row["step"]: row["tokens_per_second"]
            for row in self.rows
            if row["split"] == "train" and row["step"] > self.steps / 4
        }
        return float(np.median(list(values.values()))) if values else math.nan

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step and member."""
        return self.config["data"]["batch"] * self.config["data"]["length"]

    @property
    def began(self) -> str:
        """When the run was first started, ISO 8601 in UTC; "" if that is not recorded."""
        return next((segment["time"] for segment in self.manifest.get("segments", [])), "")

    @property
    def budgets(self) -> list[tuple[int, int]]:
        """The old and the new number of steps for each change of the budget, on which schedules depend."""
        changes = [segment.get("changed", {}) for segment in self.manifest.get("segments", [])]
        return [(change["steps"][0], change["steps"][1]) for change in changes if "steps" in change]

    @property
    def hours(self) -> float:
        """Hours of training, without compilation."""
        return max((curve.seconds[-1] for curve in self.curves), default=0.0) / 3600

    @property
    def bits_per_nat(self) -> float:
        """The factor from nats per token to bits per byte."""
        return 1 / (math.log(2) * self.manifest["data"]["bytes_per_token"])

    def in_bits(self) -> "Run":
        """Return the run with its losses in bits per byte instead of nats per token."""
        scale = self.bits_per_nat
        return replace(self, rows=[row | {"nats": row["nats"] and row["nats"] * scale} for row in self.rows])

    def at(self, learning_rate: float) -> "Run":
        """Return the run with only the members that have this peak learning rate."""
        members = [member for member in self.manifest["members"] if member["learning_rate"] == learning_rate]
        return replace(self, manifest={**self.manifest, "members": members})


@dataclass(frozen=True)
class Sweep:
    """The runs in one folder, or those of one of its settings, and the claims about them."""

    name: str
    path: Path
    runs: list[Run]
    claims: dict[str, dict[str, Any]]  # by name, as in configs/studies.py; `since` is when a claim was first recorded
    tuning: list[dict[str, Any]]  # rows of the summary.json of a learning-rate grid that is given without its runs
    setting: str = ""

    @property
    def title(self) -> str:
        """The name, with the setting."""
        return f"{self.name}: {self.setting}" if self.setting else self.name

    @property
    def grid(self) -> bool:
        """True for a grid of learning rates, False for a comparison."""
        return any(len(run.learning_rates) > 1 for run in self.runs) or bool(self.tuning)

    @property
    def settings(self) -> list["Sweep"]:
        """One sweep per setting, within which arms are compared; only this sweep if it has no settings."""
        names = [run.arm.rpartition("/")[0] for run in self.runs] + [row["setting"] for row in self.tuning]
        return [self._within(name) for name in dict.fromkeys(names)] if any(names) else [self]

    def _within(self, setting: str) -> "Sweep":
        parts = [(run, *run.arm.rpartition("/")) for run in self.runs]
        return replace(
            self,
            runs=[replace(run, arm=arm) for run, where, _, arm in parts if where == setting],
            claims={name: claim for name, claim in self.claims.items() if claim["setting"] == setting},
            tuning=[row for row in self.tuning if row["setting"] == setting],
            setting=setting,
        )

    def at(self, learning_rates: Mapping[str, float]) -> "Sweep":
        """Return the grid with each of these arms at one of its learning rates."""
        return replace(self, runs=[run.at(learning_rates[run.arm]) for run in self.runs if run.arm in learning_rates])


def distinct(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """Return the sweeps with unique names. Equal names are told apart by their folders, and then by numbers.

    Raises Refusal if a folder is given twice.
    """
    places = [(sweep.path.resolve(), sweep.name) for sweep in sweeps]
    if again := [sweep.path for sweep, place in zip(sweeps, places, strict=True) if places.count(place) > 1]:
        raise Refusal(f"{str(again[0])!r} is given more than once: give each folder once")
    names: list[str] = []
    for folder, name in places:
        name = f"{name} ({folder.name})" if [other for _, other in places].count(name) > 1 else name
        numbered = (f"{name} {number}" for number in itertools.count(2))
        names.append(next(option for option in itertools.chain([name], numbered) if option not in names))
    return [replace(sweep, name=name) for sweep, name in zip(sweeps, names, strict=True)]


def table(sweep: Sweep) -> list[dict[str, Any]]:
    """Return one row per member that ends at a finite loss.

    `final_nats` is per token, `area` is the mean loss over the steps, and `seconds` is the time of training all members
    of the run together.
    """
    return [
        {
            "sweep": sweep.name,
            "setting": setting.setting,
            "arm": run.arm,
            "encoding": run.encoding,
            "objective": run.objective,
            "attention": run.attention,
            "seed": curve.seed,
            "learning_rate": curve.learning_rate,
            "status": run.status["status"],
            "steps": int(curve.steps[-1]),
            "final_nats": curve.final,
            "bits_per_byte": curve.final * run.bits_per_nat,
            "area": curve.area,
            "seconds": float(curve.seconds[-1]),
            "parameters": run.manifest["parameters"],
        }
        for setting in sweep.settings
        for run in setting.runs
        for curve in run.curves
    ]
