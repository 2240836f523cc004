"""Run directories, read as data: config, manifest, status, metrics. Nothing in them is executed."""

import itertools
import json
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
    rate: float  # peak learning rate
    steps: np.ndarray  # [E], updates done at each evaluation, ascending
    nats: np.ndarray  # [E], per token; nan where it was not finite, and at the end of one that diverged
    seconds: np.ndarray  # [E], of training, compiling left out

    @property
    def final(self) -> float:
        """Nats per token at the last evaluation."""
        return float(self.nats[-1]) if len(self.nats) else float("nan")

    @property
    def area(self) -> float:
        """Mean loss over the steps, nats per token: the area under the curve, over its width. Evaluations that were not
        finite are passed over."""
        finite = np.isfinite(self.nats)
        return float(np.trapezoid(self.nats[finite], self.steps[finite]) / (self.steps[-1] - self.steps[0]))


@dataclass(frozen=True)
class Run:
    """One run directory: an ensemble of members that share an encoding."""

    path: Path
    arm: str  # ARM or, in a sweep of several settings, SETTING/ARM
    config: dict[str, Any]
    manifest: dict[str, Any]
    status: dict[str, Any]
    rows: list[dict[str, Any]]
    beyond: dict[str, Any]  # what scripts.extrapolate found; no rows where it was not run
    looks: dict[str, Any]  # what scripts.distance found; no mass where it was not run

    @property
    def encoding(self) -> str:
        return self.config["model"]["position"]["name"]

    @property
    def objective(self) -> str:
        """causal or masked; runs from before there was a choice are causal."""
        return self.config.get("objective", {"name": "causal"})["name"]

    @property
    def attention(self) -> str:
        """softmax or performer; runs from before there was a choice are softmax."""
        return self.config["model"].get("attention", {"name": "softmax"})["name"]

    @property
    def steps(self) -> int:
        """The budget, in steps."""
        return self.config["steps"]

    @property
    def finished(self) -> bool:
        return self.status["status"] == "finished"

    @property
    def curves(self) -> list[Curve]:
        """A curve for each member that has evaluations, did not diverge and ends at a finite loss."""
        return [curve for curve in self.members.values() if math.isfinite(curve.final)]

    @property
    def not_finite(self) -> list[int]:
        """The members that did not diverge, and whose last evaluation was not finite."""
        diverged = self.status.get("diverged", {})
        return [i for i, curve in self.members.items() if not math.isfinite(curve.final) and str(i) not in diverged]

    @cached_property
    def members(self) -> dict[int, Curve]:
        """By its number, the curve of each member that has evaluations. That of one that diverged goes on to the budget
        without a loss: a loss that it had not come to by then it never comes to."""
        found = {}
        evaluations = [row for row in self.rows if row["split"] == "validation"]
        longest = max((row["seconds"] for row in evaluations), default=0.0)
        for member in self.manifest["members"]:
            rows = [row for row in evaluations if row["member"] == member["member"]]
            if rows and str(member["member"]) in self.status.get("diverged", {}):
                rows.append({"step": self.steps, "nats": None, "seconds": longest})
            columns = [np.array([row[key] for row in rows], float) for key in ("step", "nats", "seconds")]
            if rows:
                found[member["member"]] = Curve(member["seed"], member["learning_rate"], *columns)
        return found

    @property
    def rates(self) -> list[float]:
        return sorted({member["learning_rate"] for member in self.manifest["members"]})

    @property
    def batches(self) -> dict[str, str]:
        """By seed, the sha256 over every batch that was consumed: equal for equal tokens in an equal order."""
        sums = self.manifest.get("batches", {}).get("sha256", [])
        members = [member for member in self.manifest["members"] if member["member"] < len(sums)]
        return {str(member["seed"]): sums[member["member"]] for member in members}

    @property
    def tokens_per_second(self) -> float:
        """Of all members together: the median over the intervals after the first quarter of the run."""
        values = {
            row["step"]: row["tokens_per_second"]  # each member's row has it; one that diverged has none
            for row in self.rows
            if row["split"] == "train" and row["step"] > self.steps / 4
        }
        return float(np.median(list(values.values()))) if values else float("nan")

    @property
    def tokens_per_step(self) -> int:
        """Of one member."""
        return self.config["data"]["batch"] * self.config["data"]["length"]

    @property
    def began(self) -> str:
        """When it was first started, ISO 8601 in UTC; "" where that is not recorded."""
        return next((segment["time"] for segment in self.manifest.get("segments", [])), "")

    @property
    def budgets(self) -> list[tuple[int, int]]:
        """The steps before and after each time that it went on with another number of them: schedules hang on it."""
        changed = [segment.get("changed", {}) for segment in self.manifest.get("segments", [])]
        return [(each["steps"][0], each["steps"][1]) for each in changed if "steps" in each]

    @property
    def hours(self) -> float:
        """Of training, compiling left out."""
        return max((curve.seconds[-1] for curve in self.curves), default=0.0) / 3600

    @property
    def bits_per_nat(self) -> float:
        """What turns nats per token into bits per byte."""
        return 1 / (math.log(2) * self.manifest["data"]["bytes_per_token"])

    def in_bits(self) -> "Run":
        """The same run with its losses in bits per byte instead of nats per token."""
        scaled = lambda nats: nats and nats * self.bits_per_nat  # noqa: E731 (None where it was not finite)
        return replace(self, rows=[row | {"nats": scaled(row["nats"])} for row in self.rows])

    def at(self, rate: float) -> "Run":
        """The same run, of its members with this peak rate alone."""
        members = [member for member in self.manifest["members"] if member["learning_rate"] == rate]
        return replace(self, manifest={**self.manifest, "members": members})


@dataclass(frozen=True)
class Sweep:
    """The runs of one folder, or those of one of its settings, and the claims that are made of them."""

    name: str
    path: Path
    runs: list[Run]
    claims: dict[str, dict[str, Any]]  # by name, as configs/studies.py writes them, and `since`: when first seen
    archive: dict[str, Any]  # the summary.json of a folder that holds a grid's report and nothing else
    setting: str = ""

    @property
    def title(self) -> str:
        """The name, with the setting."""
        return f"{self.name}: {self.setting}" if self.setting else self.name

    @property
    def grid(self) -> bool:
        """Whether this is a grid of learning rates, and not a comparison."""
        return any(len(run.rates) > 1 for run in self.runs) or bool(self.archive)

    @property
    def settings(self) -> list["Sweep"]:
        """A sweep for each setting, whose arms are compared; itself where it has none."""
        names = dict.fromkeys(run.arm.rpartition("/")[0] for run in self.runs)
        if set(names) <= {""}:
            return [self]
        return [self._of(name) for name in names]

    def _of(self, setting: str) -> "Sweep":
        parted = [(run, *run.arm.rpartition("/")) for run in self.runs]
        runs = [replace(run, arm=arm) for run, where, _, arm in parted if where == setting]
        claims = {name: claim for name, claim in self.claims.items() if claim["setting"] == setting}
        return replace(self, runs=runs, claims=claims, setting=setting)

    def at(self, rates: Mapping[str, float]) -> "Sweep":
        """Of a grid, each arm at one of its rates."""
        return replace(self, runs=[run.at(rates[run.arm]) for run in self.runs if run.arm in rates])


def load(path: str | Path) -> Sweep:
    """The sweep in a folder, one of its settings (`runs/replication/causal-softmax`), a single run, or an archive.

    Raises Refusal where there is none, where a file is damaged, or where an archive holds several sweeps.
    """
    sweeps = load_all(path)
    if len(sweeps) > 1:
        names = ", ".join(sweep.name for sweep in sweeps)
        raise Refusal(f"{str(path)!r} is the archive of several sweeps ({names}): use load_all")
    return sweeps[0]


def load_all(path: str | Path) -> list[Sweep]:
    """The sweep in a folder; or those of an archive, the `runs.json` (or, of a grid, the summary.json) of a report.

    Raises Refusal where there is none, or where a file is damaged.
    """
    root = Path(path)
    folders = sorted({config.parent for config in root.rglob("config.json")})
    if folders:
        runs = [_load_run(folder, root) for folder in folders]
        planned = {path: path.relative_to(root / "plan").with_suffix("") for path in (root / "plan").rglob("*.json")}
        runs += [
            _load_run(root / arm, root, path) for path, arm in sorted(planned.items()) if root / arm not in folders
        ]
        return [Sweep(root.resolve().name, root, runs, _stated(root.resolve()), {})]
    if archived := _json(root / "runs.json", None):
        return [_unpack(each, root) for each in _archived(archived, root)]
    summary = _json(root / "summary.json", {})
    if not isinstance(summary, dict) or not summary.get("tuning"):
        raise Refusal(
            f"{str(root)!r} holds no run (no config.json in it or below): give the --workdir of a sweep or a run"
        )
    return [Sweep(root.resolve().name, root, [], {}, summary)]


def distinct(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """The sweeps, those of one name told apart by their folders, and then by number. Raises Refusal for a folder that
    is given twice."""
    places = [(each.path.resolve(), each.name) for each in sweeps]
    if again := [each.path for each, place in zip(sweeps, places, strict=True) if places.count(place) > 1]:
        raise Refusal(f"{str(again[0])!r} is given more than once: give each folder once")
    names: list[str] = []
    for each in sweeps:
        alike = sum(other.name == each.name for other in sweeps) > 1
        name = f"{each.name} ({each.path.resolve().name})" if alike else each.name
        more = (f"{name} {number}" for number in itertools.count(2))
        names.append(next(option for option in (name, *itertools.islice(more, len(names))) if option not in names))
    return [replace(each, name=name) for each, name in zip(sweeps, names, strict=True)]


def table(sweep: Sweep) -> list[dict[str, Any]]:
    """A row for each member of each run that has evaluations: what it is, and its loss at the end.

    `final_nats` is per token, `area` the mean loss over its steps, `seconds` those of training all members together.
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
            "rate": curve.rate,
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


KEYS = {"treatment", "baseline", "setting", "outcome", "relation", "threshold", "source", "published", "since"}


def _stated(root: Path) -> dict[str, dict[str, Any]]:
    """The claims of a sweep; in the folder of one of its settings, those that are made of it."""

    def of(folder: Path) -> dict[str, dict[str, Any]]:
        about = _json(folder / "sweep.json", {})
        return _claims(folder, about.get("claims", {}) if isinstance(about, dict) else {})

    if (root / "sweep.json").exists():
        return of(root)
    return {name: claim | {"setting": ""} for name, claim in of(root.parent).items() if claim["setting"] == root.name}


def _claims(root: Path, claims: Any) -> dict[str, dict[str, Any]]:
    for name, claim in claims.items() if isinstance(claims, dict) else [("claims", claims)]:
        if not isinstance(claim, dict) or not claim.keys() >= KEYS:
            raise Refusal(f"{root / 'sweep.json'}: claim {name!r} lacks one of {', '.join(sorted(KEYS))}")
    return claims


# Of a manifest, what says nothing of a run's result or its comparability, and may name a person's machine.
UNPACKED = ("argv", "overrides", "host", "segments", "xla_flags", "glibc_tunables")


def pack(sweep: Sweep) -> dict[str, Any]:
    """All of a sweep that a report needs, small: configs, manifests, and the validation curves alone."""
    return {"name": sweep.name, "claims": sweep.claims, "runs": [_pack(run) for run in sweep.runs]}


def _pack(run: Run) -> dict[str, Any]:
    rows = [row for row in run.rows if row["split"] == "validation"]
    manifest = {key: value for key, value in run.manifest.items() if key not in UNPACKED}
    return {
        "arm": run.arm,
        "config": run.config,
        "manifest": manifest | {"segments": [_segment(each) for each in run.manifest.get("segments", [])]},
        "status": run.status,
        "tokens_per_second": None if math.isnan(run.tokens_per_second) else run.tokens_per_second,
        "member": [row["member"] for row in rows],
        **{key: [row[key] for row in rows] for key in ("step", "nats", "seconds")},
    }


def _segment(segment: dict[str, Any]) -> dict[str, Any]:
    """When it began, and from what number of steps to what other."""
    changed = segment.get("changed", {})
    return {"time": segment["time"]} | ({"changed": {"steps": changed["steps"]}} if "steps" in changed else {})


def _unpack(archived: dict[str, Any], root: Path) -> Sweep:
    runs = []
    for each in archived["runs"]:
        columns = zip(each["member"], each["step"], each["nats"], each["seconds"], strict=True)
        rows = [
            {"split": "validation", "member": member, "step": step, "nats": nats, "seconds": seconds}
            for member, step, nats, seconds in columns
        ]
        if each["tokens_per_second"]:
            last = {"split": "train", "member": 0, "step": each["config"]["steps"]}
            rows.append(last | {"nats": None, "tokens_per_second": each["tokens_per_second"]})
        kept = {key: each[key] for key in ("arm", "config", "manifest", "status")}
        runs.append(Run(path=root, rows=rows, beyond={"length": 0, "rows": []}, looks={"mass": []}, **kept))
    return Sweep(archived["name"], root, runs, _claims(root, archived["claims"]), {})


PACKED = {"arm", "config", "manifest", "status", "tokens_per_second", "member", "step", "nats", "seconds"}


def _archived(value: Any, root: Path) -> list[dict[str, Any]]:
    try:
        whole = [
            {"name", "claims", "runs"} <= each.keys() and all(run.keys() >= PACKED for run in each["runs"])
            for each in value["sweeps"]
        ]
    except (KeyError, TypeError, AttributeError):
        whole = []
    if not whole or not all(whole):
        raise Refusal(f"{root / 'runs.json'} is not a report's: it is damaged, make it again")
    return value["sweeps"]


def _load_run(folder: Path, root: Path, plan: Path | None = None) -> Run:
    """The run in a folder of the sweep `root`; of one that a sweep planned and that never began, by its `plan`."""
    arm = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    plan = plan or folder / "config.json"
    config, manifest = _json(plan, {}), _json(folder / "manifest.json", {"members": []})
    status = _json(folder / "status.json", {"status": "not run", "why": "", "step": 0})
    for path, value, keys in [
        (plan, config, ("steps", "data", "model", "optimizer")),
        (folder / "manifest.json", manifest, ("members",)),
        (folder / "status.json", status, ("status",)),
    ]:
        missing = [key for key in keys if not isinstance(value, dict) or key not in value]
        if missing:
            raise Refusal(f"{path} is not a run's (it lacks {', '.join(missing)}): move it away or repair it")
    beyond = _json(folder / "extrapolation.json", {"length": 0, "rows": []})
    if not isinstance(beyond, dict) or not {"length", "rows"} <= beyond.keys():
        raise Refusal(f"{folder / 'extrapolation.json'} is not what scripts.extrapolate writes: make it again")
    looks = _json(folder / "distance.json", {"mass": []})
    if not isinstance(looks, dict) or not (looks == {"mass": []} or {"mass", "mean", "edges"} <= looks.keys()):
        raise Refusal(f"{folder / 'distance.json'} is not what scripts.distance writes: make it again")
    return Run(folder, arm, config, manifest, status, _rows(folder / "metrics.jsonl"), beyond, looks)


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
