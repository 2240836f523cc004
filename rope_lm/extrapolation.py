"""Loss beyond the trained length: the same text in pieces of 1, 2, 4, 8 times that length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rope_lm import objective, trained
from rope_lm.refusal import Refusal
from rope_lm.transformer import Transformer

BINS = 24  # of positions, in the loss by position; widths grow geometrically
# Encodings that a rotary run can be evaluated with, without training. `factor` is how much longer the rows are.
SCALINGS: dict[str, dict[str, float]] = {
    "rotary_linear": {},
    "rotary_ntk": {},  # equal to dynamic scaling if all rows have one length
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
}


def check(workdir: Path) -> dict[str, Any]:
    """Return the config of a run. Raises Refusal if longer rows would be a different task."""
    config, _ = trained.read(workdir)
    if config["objective"]["name"] != "causal":
        raise Refusal(f"{str(workdir)!r} was trained with objective={config['objective']['name']}: give a causal run")
    if config["data"]["name"].startswith("probe:"):
        raise Refusal(
            f"{str(workdir)!r} was trained on {config['data']['name']}, whose rows are another task when they are "
            "longer: use scripts.probe --multiples"
        )
    return config


def measure(workdir: Path, rows: np.ndarray, multiple: int, scaling: str) -> dict[str, Any]:
    """Measure the nats per token of every finite member of a run at `multiple` times its length.

    `rows`: int [R, W], the text. `scaling`: a name in SCALINGS, or "" for the run's own encoding. In the result,
    `apart` is the loss in pieces that do not overlap (`by_position` is the same by position), and `sliding` is the loss
    in overlapping windows, where each token has at least `multiple - 1/2` trained lengths of context if the row has
    that many before it. Raises Refusal if the encoding cannot read such rows.
    """
    config = check(workdir)
    short = config["data"]["length"]
    length = short * multiple
    run = trained.load(workdir, position(config["model"]["position"], scaling, multiple, short), length).finite()
    pieces = _cut(rows, range(0, rows.shape[1] - 1, length), length)
    starts = _starts(rows.shape[1] - 1, length, max(1, short // 2))
    windows = _cut(rows, starts, length)
    apart, sliding = [], []
    for model in run.models:
        nats = trained.over_rows(_nats, model, pieces.reshape(-1, length + 1))
        apart.append(nats.mean(0))
        slid = trained.over_rows(_nats, model, windows.reshape(-1, length + 1)).reshape(*windows.shape[:2], length)
        sliding.append(float(_fresh(slid, starts).mean()))
    edges = np.unique(np.geomspace(1, length + 1, BINS + 1).round().astype(int)) - 1
    by_position = [np.add.reduceat(nats, edges[:-1]) / np.diff(edges) for nats in apart]
    return {
        "multiple": multiple,
        "scaling": scaling,
        "tokens": int(pieces.shape[0] * pieces.shape[1] * length),
        "seeds": list(run.seeds),
        "apart": [float(nats.mean()) for nats in apart],
        "sliding": sliding,
        "positions": ((edges[:-1] + edges[1:] + 1) / 2).tolist(),
        "by_position": [nats.tolist() for nats in by_position],
    }


def position(row: Mapping[str, Any], scaling: str, multiple: int, short: int) -> dict[str, Any]:
    """Return the config row of the encoding to evaluate with at `multiple` times `short`, the trained length.

    It is the run's own, or rotary scaled by one of SCALINGS. Raises Refusal for positions that were never trained.
    """
    if multiple == 1:
        return dict(row)
    if row.get("limit") is not None:
        raise Refusal(f"{row['name']}: positions from {short} on were not trained, so longer rows cannot be read")
    if not scaling:
        return dict(row)
    if row["name"] != "rotary":
        raise Refusal(f"{scaling} scales rotary, the run was trained with {row['name']}")
    scaled = {"name": scaling, "base": row["base"], "factor": float(multiple), **SCALINGS[scaling]}
    return scaled | ({} if scaling in ("rotary_linear", "rotary_ntk") else {"trained_length": short})


def _cut(rows: np.ndarray, starts: Sequence[int], length: int) -> np.ndarray:
    """Return [rows, pieces, length + 1]: the pieces of each row that begin at `starts`."""
    return np.stack([rows[:, start : start + length + 1] for start in starts], axis=1)


def _starts(tokens: int, length: int, stride: int) -> list[int]:
    """Return the starts of windows over these tokens: one every `stride`, and one that ends at the last token."""
    return [*range(0, tokens - length, stride), tokens - length]


def _fresh(nats: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """Return every token's loss once, from overlapping windows: all of the first, then what each later one adds."""
    steps = np.diff(starts)
    later = [nats[:, 1 + i, -step:] for i, step in enumerate(steps)]
    return np.concatenate([nats[:, 0], *later], axis=1)


def _nats(model: Transformer, rows: jax.Array) -> jax.Array:
    return objective.cross_entropy(model(rows[:, :-1])[0], rows[:, 1:])
