"""Attention of a trained model by distance, per layer and head, on validation text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm import trained
from rope_lm.kernels.products import einsum


def measure(workdir: Path, rows: int) -> dict[str, Any]:
    """Measure how far back every finite member of a run attends, over `rows` rows of validation text.

    Only the second half of the queries counts, which all see at least half of the trained length. In the result,
    `edges` [E + 1] are the bounds of bins of distance in tokens (upper bound excluded; negative distances are ahead of
    the query), `mass` [M L N E] is the share of attention in each bin, and `mean` [M L N] is the mean absolute distance
    in tokens. Raises Refusal if there is no run, or if the text here is not the run's.
    """
    run = trained.load(workdir).finite()
    text = trained.text(workdir, rows)
    length = text.shape[1] - 1
    distance = np.arange(length)[length // 2 :, None] - np.arange(length)
    edges = _edges(length, run.objective.causal)
    bins = jnp.asarray(np.digitize(distance, edges) - 1)
    mass, mean = [], []
    for model in run.models:
        graph, state = nnx.split(model)
        profiles = [_profile(graph, state, row[None, :-1], jnp.asarray(distance), bins, len(edges) - 1) for row in text]
        mass.append(np.mean([profile[0] for profile in profiles], axis=0).tolist())
        mean.append(np.mean([profile[1] for profile in profiles], axis=0).tolist())
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
    """Return 0, 1, 2, 4, 8, ... up to the length; mirrored if tokens see what is ahead of them."""
    powers = 2 ** np.arange(int(np.ceil(np.log2(length))) + 1)
    back = np.concatenate([[0], powers])
    return back if causal else np.concatenate([1 - powers[:0:-1], back])


@jax.jit(static_argnums=(0, 5))
def _profile(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "1 T"],
    distance: Int[Array, "Q T"],
    bins: Int[Array, "Q T"],
    count: int,
) -> tuple[Float[Array, "L N E"], Float[Array, "L N"]]:
    """Return mass and mean distance of one row, over its last Q queries."""
    weights = nnx.merge(graph, state).weights(tokens)[:, 0, :, -distance.shape[0] :]
    one_hot = bins[..., None] == jnp.arange(count)
    mass = einsum("lnts,tse->lne", weights, one_hot.astype(jnp.float32)) / distance.shape[0]
    mean = einsum("lnts,ts->ln", weights, jnp.abs(distance).astype(jnp.float32)) / distance.shape[0]
    return mass, mean
