"""Run directories in the format that a run writes, with losses that a test chooses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs import lm
from scripts import entry

STEPS = 1000
BEGAN = "2026-01-02T00:00:00+00:00"


def write_run(
    folder: Path,
    encoding: str,
    speed: float,
    seeds: tuple[int, ...] = (0, 1, 2),
    rates: tuple[float, ...] = (3e-3,),
    status: str = "finished",
    loss: Callable[[np.ndarray, int, float], np.ndarray] | None = None,
    changes: dict[str, dict[str, object]] | None = None,
    **manifest: object,
) -> Path:
    """A run whose loss after n steps is 1 + 5 / (1 + speed * n / 50), with a little noise by seed.

    `changes` are made in its config, the rest in its manifest.
    """
    folder.mkdir(parents=True)
    config = entry.plain(lm.get_config(f"position={encoding}"))
    config |= {"steps": STEPS, "seeds": seeds}
    config["optimizer"]["learning_rate"] = rates
    for section, values in (changes or {}).items():
        config[section] = {**config.get(section, {}), **values}
    members = [(seed, rate) for seed in seeds for rate in rates]
    described = {
        "schema": 1,
        "members": [{"member": i, "seed": seed, "learning_rate": rate} for i, (seed, rate) in enumerate(members)],
        "commit": "c" * 40,
        "diff": "",
        "kernel": "blocked",
        "execution": {"in_turn": True, "pieces": 1, "written_out": True, "in_place": False},
        "precision": "float32",
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "versions": {"jax": "1", "flax": "1", "optax": "1"},
        "python": "3.11",
        "data": {
            "fingerprint": {"text": "f" * 64, "tokenizer": "bytes-1"},
            "bytes_per_token": 1.0,
            "tokens": {"train": 10**6},
        },
        "batches": {"step": STEPS, "sha256": [f"{seed}" * 64 for seed, _ in members]},
        "flops_per_token": 1e6,
        "segments": [{"step": 0, "time": BEGAN}],
        "parameters": 131_648,
        "parameters_position": 0,
    } | manifest
    rows = []
    for i, (seed, rate) in enumerate(members):
        for step in range(0, STEPS + 1, 50):
            nats = 1 + 5 / (1 + speed * (1 + 0.02 * (seed % 3)) * step / 50)
            nats = float(loss(np.array(step), seed, rate)) if loss else nats
            row = {"step": step, "member": i, "nats": nats, "tokens": 10, "seconds": step / 100 / speed}
            rows.append({**row, "split": "validation", "bits_per_byte": nats})
            if step:
                rows.append(
                    {
                        **row,
                        "split": "train",
                        "tokens_per_second": 1000.0 * speed,
                        "gradient_norm": 1,
                        "learning_rate": 1,
                    }
                )
    write = lambda name, value: (folder / name).write_text(json.dumps(value))  # noqa: E731
    write("config.json", config)
    write("manifest.json", described)
    write("status.json", {"status": status, "why": "", "step": STEPS, "diverged": {}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def only(texts: list[str]) -> str:
    (text,) = texts
    return text


def diverge(folder: Path, steps: dict[int, int]) -> None:
    """Makes members of a run diverge at these steps: they have no rows after."""
    status = json.loads((folder / "status.json").read_text())
    lost = {"diverged": {str(member): step for member, step in steps.items()}, "why": "member ... not finite"}
    (folder / "status.json").write_text(json.dumps(status | lost))
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [row for row in rows if row["step"] <= steps.get(row["member"], STEPS)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Rotary twice as fast as learned, 1.2 times as sinusoidal, as fast as relative_bias."""
    for name, speed in {"none": 0.5, "learned": 1.0, "sinusoidal": 1.7, "relative_bias": 2.0, "rotary": 2.0}.items():
        write_run(tmp_path / "sweep" / name, name, speed)
    return tmp_path / "sweep"


def write_claim(folder: Path, since: str = "2026-01-01T00:00:00+00:00", **claim: object) -> None:
    """A sweep.json in which rotary was claimed, before the runs began, to be faster than learned."""
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
    (folder / "sweep.json").write_text(json.dumps(about))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """As write_study has it."""
    return write_study(tmp_path / "study")


def write_study(folder: Path) -> Path:
    """Two settings of six seeds: rotary twice as fast as learned in one, half as fast in the other."""
    seeds = (0, 1, 2, 3, 4, 5)
    for setting, objective, speeds in [
        ("causal-softmax", {"name": "causal"}, {"learned": 1.0, "sinusoidal": 2.0, "rotary": 2.0}),
        ("masked-softmax", {"name": "masked", "mask_rate": 0.15}, {"learned": 2.0, "rotary": 1.0}),
    ]:
        for name, speed in speeds.items():
            write_run(folder / setting / name, name, speed, seeds, changes={"objective": objective})
    return folder
