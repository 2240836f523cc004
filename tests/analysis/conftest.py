"""Run directories in the format that a run writes, with losses that a test chooses."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from configs import lm
from rope_lm.analysis import archive, page, report
from rope_lm.analysis.findings import Findings, gather
from rope_lm.analysis.runs import Sweep
from rope_lm.analysis.summary import finite, summarize
from scripts import entry

STEPS = 1000
BEGAN = "2026-01-02T00:00:00+00:00"
SIX = (0, 1, 2, 3, 4, 5)
Loss = Callable[[int, int, float], float]  # of step, seed and learning rate
MANIFEST = {
    "schema": 1,
    "commit": "c" * 40,
    "diff": "",
    "kernel": "blocked",
    "execution": {"kernel": "blocked", "pieces": 1},
    "precision": "float32",
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
    "versions": {"jax": "1", "flax": "1", "optax": "1"},
    "python": "3.11",
    "environment": {"NPROC": "2"},
    "data": {
        "fingerprint": {"text": "f" * 64, "tokenizer": "bytes-1"},
        "bytes_per_token": 1.0,
        "tokens": {"train": 10**6},
    },
    "flops_per_token": 1e6,
    "segments": [{"step": 0, "time": BEGAN}],
    "parameters": 131_648,
    "parameters_position": 0,
}


def write_run(
    folder: Path,
    encoding: str,
    speed: float | Loss,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = (3e-3,),
    config: Mapping[str, Mapping[str, Any]] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run whose loss is 1 + 5 / (1 + speed * n / 50) after n steps, with a little noise by seed.

    `speed` may be the loss itself. `config` and `manifest` are changes.
    """
    folder.mkdir(parents=True)
    sections = entry.plain(lm.get_config(f"position={encoding}")) | {"steps": STEPS, "seeds": tuple(seeds)}
    sections["optimizer"]["learning_rate"] = tuple(rates)
    for section, values in (config or {}).items():
        sections[section] = {**sections.get(section, {}), **values}
    members = [
        {"member": i, "seed": seed, "learning_rate": rate} for i, (seed, rate) in enumerate(product(seeds, rates))
    ]
    batches = {"step": STEPS, "sha256": [f"{member['seed']}" * 64 for member in members]}
    _write(folder / "config.json", sections)
    _write(folder / "manifest.json", {**MANIFEST, "members": members, "batches": batches, **(manifest or {})})
    set_status(folder, "finished")
    rows = [row for member in members for step in range(0, STEPS + 1, 50) for row in _rows(member, step, speed)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _rows(member: Mapping[str, Any], step: int, speed: float | Loss) -> list[dict[str, Any]]:
    """Return the rows of one member at one step: of validation and, after step 0, of training."""
    if callable(speed):
        pace, nats = 1.0, float(speed(step, member["seed"], member["learning_rate"]))
    else:
        pace, nats = speed, 1 + 5 / (1 + speed * (1 + 0.02 * (member["seed"] % 3)) * step / 50)
    row = {"step": step, "member": member["member"], "nats": nats, "tokens": 10, "seconds": step / 100 / pace}
    trained = {**row, "split": "train", "tokens_per_second": 1000.0 * pace, "gradient_norm": 1, "learning_rate": 1}
    return [{**row, "split": "validation", "bits_per_byte": nats}, *[trained] * (step > 0)]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def set_status(folder: Path, status: str, why: str = "", diverged: Mapping[str, int] | None = None) -> None:
    """Write the status of a run."""
    _write(folder / "status.json", {"status": status, "why": why, "step": STEPS, "diverged": diverged or {}})


def diverge(folder: Path, steps: Mapping[int, int]) -> None:
    """Make members of a run diverge at these steps: they have no rows after."""
    set_status(folder, "finished", "member ... not finite", {str(member): step for member, step in steps.items()})
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [row for row in rows if row["step"] <= steps.get(row["member"], STEPS)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def write_claim(folder: Path, since: str = "2026-01-01T00:00:00+00:00", **claim: object) -> None:
    """Add a claim to sweep.json: that rotary is faster than learned, recorded before the runs began."""
    claimed = {
        "treatment": "rotary",
        "baseline": "learned",
        "setting": "",
        "outcome": "steps",
        "relation": "above",
        "threshold": 1.0,
        "source": "a paper",
        "published": "30% faster",
        "since": since,
    } | claim
    about = json.loads((folder / "sweep.json").read_text()) if (folder / "sweep.json").exists() else {"claims": {}}
    about["claims"][f"claim {len(about['claims'])}"] = claimed
    _write(folder / "sweep.json", about)


def write_sweep(folder: Path) -> Path:
    """Write a sweep: rotary twice as fast as learned, 1.2 times as sinusoidal, as fast as relative_bias."""
    for name, speed in {"none": 0.5, "learned": 1.0, "sinusoidal": 1.7, "relative_bias": 2.0, "rotary": 2.0}.items():
        write_run(folder / name, name, speed)
    return folder


def write_study(folder: Path) -> Path:
    """Write two settings of six seeds: rotary twice as fast as learned in one, half as fast in the other."""
    for setting, objective, speeds in [
        ("causal-softmax", {"name": "causal"}, {"learned": 1.0, "sinusoidal": 2.0, "rotary": 2.0}),
        ("masked-softmax", {"name": "masked", "mask_rate": 0.15}, {"learned": 2.0, "rotary": 1.0}),
    ]:
        for name, speed in speeds.items():
            write_run(folder / setting / name, name, speed, SIX, config={"objective": objective})
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The sweep of write_sweep."""
    return write_sweep(tmp_path / "sweep")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The study of write_study."""
    return write_study(tmp_path / "study")


def find(*sweeps: Sweep) -> Findings:
    """Return the findings about rotary."""
    return gather(sweeps, "rotary", "the command")


def summary(*sweeps: Sweep) -> dict[str, Any]:
    """Return the summary of a report on rotary. Nothing is drawn or written."""
    return summarize(find(*sweeps))


def html(*sweeps: Sweep) -> str:
    """Return the page of a report on rotary, without figures."""
    return page.render(find(*sweeps), {})


def write_archive(folder: Path, *sweeps: Sweep) -> Path:
    """Write the runs.json of a report, and nothing else."""
    folder.mkdir(parents=True)
    _write(folder / "runs.json", finite(archive.pack(find(*sweeps).sweeps)))
    return folder


def write_report(out: Path, *sweeps: Sweep) -> dict[str, Any]:
    """Write a report on rotary, with its figures."""
    return report.write(find(*sweeps), out)


def only(texts: Sequence[Any]) -> Any:
    """Return the only item."""
    (text,) = texts
    return text
