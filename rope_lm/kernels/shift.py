"""Values given per distance, rearranged into one value per pair of query and key."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rope_lm.kernels.products import einsum
from rope_lm.positions import View


def shifted_plain(x: Float[Array, "*B T R"], keys: int) -> Float[Array, "*B T S"]:
    """Return x[..., t, s + T - t], the value of each pair of query t and key s.

    The last axis of x has one entry per distance, in the order of `View.distances`: farthest first, starting one beyond
    the distance from the last query to the first key. The value of a pair whose distance is not in x is undefined.
    """
    queries, distances = x.shape[-2:]
    at = jnp.arange(keys) + (queries - jnp.arange(queries))[:, None]
    return jnp.take_along_axis(x, jnp.minimum(at, distances - 1).reshape((1,) * (x.ndim - 2) + at.shape), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def shifted(x: Float[Array, "*B T R"], keys: int) -> Float[Array, "*B T S"]:
    """Compute `shifted_plain` by reshaping (the relative shift of Transformer-XL, arXiv 1901.02860, appendix B)."""
    *batch, queries, distances = x.shape
    # Read as rows that are one shorter, each row begins one place further on than the row before it.
    flat = x.reshape(*batch, queries * distances)[..., queries:]
    return flat.reshape(*batch, queries, distances - 1)[..., :keys]


def _shifted_forward(x: Float[Array, "*B T R"], keys: int) -> tuple[Float[Array, "*B T S"], int]:
    return shifted(x, keys), x.shape[-1]


def _shifted_backward(keys: int, distances: int, g: Float[Array, "*B T S"]) -> tuple[Float[Array, "*B T R"]]:
    """Copy whole rows, then mask. XLA's own gradient pads, and computes the place of every number by a division."""
    *batch, queries, _ = g.shape
    # Filler is masked at the end. Zeros would make XLA pad again.
    if (short := distances - 1 - keys) > 0:
        g = jnp.concatenate([g, jnp.broadcast_to(g[..., :1], (*batch, queries, short))], -1)
    flat = g.reshape(*batch, queries * (distances - 1))
    before = jnp.broadcast_to(flat[..., :1], (*batch, queries))
    x = jnp.concatenate([before, flat], -1).reshape(*batch, queries, distances)
    key = jnp.arange(distances) - jnp.arange(queries, 0, -1)[:, None]
    return (jnp.where((key >= 0) & (key < keys), x, 0.0),)


shifted.defvjp(_shifted_forward, _shifted_backward)


def with_vectors(q: Float[Array, "B T N H"], vectors: Float[Array, "N H R"]) -> Float[Array, "B N T R"]:
    """Multiply each query with each of its head's vectors, all rows in one product."""
    batch, queries, heads, size = q.shape
    rows = q.transpose(2, 0, 1, 3).reshape(heads, batch * queries, size)
    return einsum("nxh,nhr->nxr", rows, vectors).reshape(heads, batch, queries, -1).swapaxes(0, 1)


def by_distance_plain(
    q: Float[Array, "B T N H"], vectors: Float[Array, "N H R"], distances: range, view: View
) -> Float[Array, "B N T S"]:
    """Return q_i r_(i-j), with one vector r per distance in `distances`, farthest first.

    Distances beyond either end share the vector at that end. Works for any positions.
    """
    nearest, farthest = distances[-1], distances[0]
    chosen = jax.nn.one_hot(farthest - jnp.clip(view.distance, nearest, farthest), len(distances), dtype=q.dtype)
    # A product with one-hot rows, because the gradient of a gather is a slow scatter.
    return einsum("bntr,btsr->bnts", with_vectors(q, vectors), chosen)


def by_distance(
    q: Float[Array, "B T N H"], vectors: Float[Array, "N H R"], distances: range, view: View
) -> Float[Array, "B N T S"]:
    """Compute `by_distance_plain` for contiguous rows, with one product per distance instead of one per pair.

    In a causal view the values of keys ahead of their query are undefined. Other rows use the plain definition.
    """
    wanted = view.distances
    if wanted is None:
        return by_distance_plain(q, vectors, distances, view)
    begin = min(max(distances[0] - wanted[0], 0), len(distances) - 1)
    end = max(begin + 1, min(distances[0] - wanted[-1] + 1, len(distances)))
    products = with_vectors(q, vectors[..., begin:end])
    before = min(max(wanted[0] - distances[begin], 0), len(wanted) - 1)
    after = len(wanted) - before - (end - begin)

    def repeat(column: Float[Array, "B N T 1"], count: int) -> Float[Array, "B N T _"]:
        return jnp.broadcast_to(column, (*column.shape[:-1], count))

    columns = [repeat(products[..., :1], before), products, repeat(products[..., -1:], after)]
    return shifted(jnp.concatenate(columns, axis=-1), view.k.length)
