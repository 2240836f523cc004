"""Encodings that act on the attention logits."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.positional.base import PositionalEncoding
from rope_lm.positions import Positions
from rope_lm.refusal import Refusal


def distance(q_positions: Positions, k_positions: Positions) -> Int[Array, "B T S"]:
    """Query index less key index, in tokens: how far back the key lies."""
    return q_positions.index[:, :, None] - k_positions.index[:, None, :]


def bucket(distance: Int[Array, "*S"], buckets: int, farthest: int) -> Int[Array, "*S"]:
    """T5's bucket of a causal distance (arXiv 1910.10683, section 2.1): exact below buckets/2, then logarithmic to
    `farthest` tokens, beyond which all share the last. Keys ahead of the query fall into bucket 0."""
    exact = buckets // 2
    distance = jnp.maximum(distance, 0)
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(farthest / exact)
    far = exact + (far * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class RelativeBias(PositionalEncoding):
    """T5's trained scalar per head and bucket of distances, shared by all layers (arXiv 1910.10683, section 2.1).

    `buckets` (32 in T5) and `farthest`, the distance in tokens from which all share the last bucket (128 in T5).
    Initial values are normal with standard deviation `scale`.
    """

    def __init__(
        self, buckets: int, farthest: int, scale: float, *, width: int, heads: int, head_size: int, rngs: nnx.Rngs
    ):
        if buckets < 2 or farthest <= buckets // 2:
            raise Refusal(
                f"model.position.buckets={buckets}, farthest={farthest}: needs buckets >= 2 and farthest > buckets/2"
            )
        self.buckets = buckets
        self.farthest = farthest
        self.table = nnx.Param(
            scale * jax.random.normal(rngs.position(), (buckets, heads)), axes=("bucket", "heads"), decays=False
        )

    def bias(self, q_positions: Positions, k_positions: Positions) -> Float[Array, "#B N T S"]:
        index = bucket(distance(q_positions, k_positions), self.buckets, self.farthest)
        # A product with one-hot rows: the gradient of a gather is a scatter, 10 times slower on the CPU.
        chosen = jax.nn.one_hot(index, self.buckets, dtype=jnp.float32)
        return jnp.einsum("btsk,kn->bnts", chosen, self.table[...])
