"""Beyond the trained length: the same text, read in pieces of 1, 2, 4, 8 times the length that a run was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import data, objective, trained
from rope_lm.refusal import Refusal
from rope_lm.settings import bind
from rope_lm.transformer import Transformer

BINS = 24  # of positions, in the loss by position; each as many times as wide as the one before
# What may be chosen for a rotary run at evaluation, without training again; `factor` is how much longer the rows are.
SCALINGS: dict[str, dict[str, float]] = {
    "rotary_linear": {},
    "rotary_ntk": {},
    "rotary_dynamic": {},
    "yarn": {"fast": 32.0, "slow": 1.0},
}


def text(config: Mapping[str, Any], longest: int, rows: int) -> np.ndarray:
    """int32 [rows longest * T + 1]: pieces of the validation text, evenly spread, for every context length to read.

    Raises Refusal where the validation text has fewer.
    """
    section = {**config["data"], "length": config["data"]["length"] * longest, "validation": rows, "batch": 1}
    return data.make(**bind(data.make, section, "data", {})).validation


def measure(workdir: Path, rows: np.ndarray, multiple: int, scaling: str) -> dict[str, Any]:
    """Nats per token of every member of a run at `multiple` times its length, over `rows` of `text`.

    `apart`: the rows cut into pieces that do not overlap, and the loss by position in them; `sliding`: windows that
    overlap, each token of the row with at least `multiple - 1/2` lengths before it where there are so many. Raises
    Refusal, with the reason, where the encoding cannot.
    """
    config = trained.load(workdir).config
    if config["objective"]["name"] != "causal":
        raise Refusal(
            f"{str(workdir)!r} was trained with objective={config['objective']['name']}: takes causal runs alone"
        )
    length = config["data"]["length"] * multiple
    run = trained.load(workdir, position(config["model"]["position"], scaling, multiple, config), length)
    pieces = _cut(rows, length, length)
    windows = _cut(rows, length, config["data"]["length"] // 2)
    apart, sliding = [], []
    for model in run.models:
        nats = np.concatenate([_nats(model, piece) for piece in _groups(pieces.reshape(-1, length + 1))])
        apart.append(nats.mean(0))
        slid = np.stack([np.concatenate([_nats(model, g) for g in _groups(row)]) for row in windows])
        sliding.append(float(_fresh(slid, config["data"]["length"] // 2).mean()))
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


def position(row: Mapping[str, Any], scaling: str, multiple: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config row of the encoding to evaluate with: the run's own, or rotary scaled by one of SCALINGS."""
    if not scaling or multiple == 1:
        return dict(row)
    if row["name"] != "rotary":
        raise Refusal(f"{scaling} scales rotary, the run was trained with {row['name']}")
    made = {"name": scaling, "base": row["base"], "factor": float(multiple), **SCALINGS[scaling]}
    return made | ({} if scaling in ("rotary_linear", "rotary_ntk") else {"trained": config["data"]["length"]})


def _cut(rows: np.ndarray, length: int, stride: int) -> np.ndarray:
    """[rows pieces length + 1]: pieces of each row, one every `stride` tokens, the last ending where the row does."""
    starts = range(0, rows.shape[1] - length, stride)
    return np.stack([rows[:, start : start + length + 1] for start in starts], axis=1)


def _fresh(nats: np.ndarray, stride: int) -> np.ndarray:
    """Of windows [rows windows length], every token's loss once: all of the first window, then the last `stride`."""
    later = nats[:, 1:, -stride:].reshape(len(nats), -1)
    return np.concatenate([nats[:, 0], later], axis=1)


def _groups(rows: np.ndarray, tokens: int = 16_384) -> Sequence[np.ndarray]:
    """Rows in groups of so many tokens at most, so that a long context needs no more memory than a short one."""
    size = max(1, tokens // rows.shape[1])
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _nats(model: Transformer, rows: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(_evaluate(graph, state, jnp.asarray(rows)))


@jax.jit(static_argnums=0)
def _evaluate(graph: nnx.GraphDef, state: nnx.State, rows: jax.Array) -> jax.Array:
    logits, _ = nnx.merge(graph, state)(rows[:, :-1])
    return objective.cross_entropy(logits, rows[:, 1:])
