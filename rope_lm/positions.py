"""Where tokens are, and which of them may see which."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Positions(NamedTuple):
    """Explicit positions of the tokens of each row. A leading dimension of 1 means "the same in every row"."""

    index: Int[Array, "B T"]  # tokens since the start of its own document
    segment: Int[Array, "B T"]  # which document of the row; 0 is padding


def contiguous(length: int, start: int = 0) -> Positions:
    """Positions [1 T] of a row that is one piece of text: start, start + 1, ..."""
    index = jnp.arange(start, start + length, dtype=jnp.int32)[None]
    return Positions(index, jnp.ones_like(index))


def packed(segment: Int[Array, "B T"]) -> Positions:
    """Positions of rows that hold several documents (1, 1, 1, 2, 2, ...) and padding (0), each contiguous."""
    column = jnp.arange(segment.shape[1], dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones_like(segment[:, :1]), segment[:, 1:] != segment[:, :-1]], axis=1)
    start = jnp.maximum.accumulate(jnp.where(begins.astype(bool), column, 0), axis=1)
    return Positions((column - start).astype(jnp.int32), segment.astype(jnp.int32))


def visible(q: Positions, k: Positions, causal: bool) -> Bool[Array, "B 1 T S"]:
    """Which keys each query may attend to: those of its own document and, if causal, not after it.

    The only mask in the package. Causality is about positions, never about array offsets. Padding, whose segment is 0,
    is a document that no other sees.
    """
    same = q.segment[:, :, None] == k.segment[:, None, :]
    if causal:
        same &= k.index[:, None, :] <= q.index[:, :, None]
    return same[:, None]
