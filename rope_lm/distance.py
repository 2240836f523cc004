"""How far a trained model looks: its attention by distance, of each layer and head, on validation text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm import trained
from rope_lm.attention import Softmax
from rope_lm.positional import einsum
from rope_lm.transformer import Transformer


def weights(model: Transformer, tokens: Int[Array, "B T"]) -> Float[Array, "L B N T T"]:
    """What each query takes from each key, in every layer.

    Attention is linear in its values: from values that say where they stand, it gathers its own weights. So this holds
    for any encoding, and for linear attention, whose weights may be negative where features are turned.
    """
    if isinstance(model.attention, Softmax):
        model = nnx.clone(model)
        model.attention = Softmax("blocked")  # the other kernels take values of the size of a key alone
    here = jnp.eye(tokens.shape[1], dtype=model.dtype)[None, :, None, :]

    def attend(q: Array, k: Array, v: Array, *rest: Any) -> tuple[Array, Array]:
        where = jnp.broadcast_to(here, (*v.shape[:3], here.shape[-1]))
        return model.attend(q, k, v, *rest)[0], model.attend(q, k, where, *rest)[0]

    _, _, found = model.stream(tokens, None, None, attend)
    return found.swapaxes(2, 3).astype(jnp.float32)


def measure(workdir: Path, rows: int) -> dict[str, Any]:
    """Attention of every member of a run that did not diverge, over `rows` rows of validation text, averaged over the
    second half of queries, all of which see at least half of the trained length.

    `edges` [E + 1] of bins of distance in tokens (the last excluded; negative is ahead of the query); by member, layer
    and head `mass` [M L N E], what falls into each, and `mean` [M L N], the mean absolute distance in tokens. Raises
    Refusal where there is no run, or its text is another.
    """
    run = trained.load(workdir).whole()
    text = trained.text(workdir, rows)
    length = text.shape[1] - 1
    away = np.arange(length)[length // 2 :, None] - np.arange(length)
    edges = _edges(length, run.objective.causal)
    bins = jnp.asarray(np.digitize(away, edges) - 1)
    mass, mean = [], []
    for model in run.models:
        graph, state = nnx.split(model)
        found = [_profile(graph, state, row[None, :-1], jnp.asarray(away), bins, len(edges) - 1) for row in text]
        mass.append(np.mean([each[0] for each in found], axis=0).tolist())
        mean.append(np.mean([each[1] for each in found], axis=0).tolist())
    return {
        "schema": 1,
        "length": length,
        "rows": rows,
        "step": run.step,
        "seeds": list(run.seeds),
        "edges": edges.tolist(),
        "mass": mass,
        "mean": mean,
    }


def _edges(length: int, causal: bool) -> np.ndarray:
    """0, 1, 2, 4, 8, ... to the length, and the same ahead where a token sees what is ahead of it."""
    steps = 2 ** np.arange(int(np.ceil(np.log2(length))) + 1)
    back = np.concatenate([[0], steps])
    return back if causal else np.concatenate([1 - steps[:0:-1], back])


@jax.jit(static_argnums=(0, 5))
def _profile(
    graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, away: jax.Array, bins: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """[L N E] and [L N] of one row, over its second half of queries."""
    found = weights(nnx.merge(graph, state), tokens)[:, 0, :, -away.shape[0] :]
    one_hot = bins[..., None] == jnp.arange(count)
    mass = einsum("lnts,tse->lne", found, one_hot.astype(jnp.float32)) / away.shape[0]
    return mass, einsum("lnts,ts->ln", found, jnp.abs(away).astype(jnp.float32)) / away.shape[0]
