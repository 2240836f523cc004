"""Where tokens are, and which of them may see which."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Positions:
    """Explicit positions of the tokens of each row. A leading dimension of 1 means "the same in every row"."""

    index: Int[Array, "B T"]  # tokens since the start of its own document
    segment: Int[Array, "B T"]  # which document of the row; 0 is padding
    # The first index where every row is one piece of text: what follows from that is then known before anything runs.
    start: int | None = field(default=None, metadata={"static": True})

    @property
    def length(self) -> int:
        return self.index.shape[1]

    def __getitem__(self, tokens: slice) -> "Positions":
        """Of some tokens of every row."""
        if self.start is None or tokens.step not in (None, 1):
            return Positions(self.index[:, tokens], self.segment[:, tokens])
        some = range(*tokens.indices(self.length))  # counted anew: XLA then sees that two such are the same
        return contiguous(len(some), self.start + some.start)


def contiguous(length: int, start: int | Int[Array, ""] = 0) -> Positions:
    """Positions [1 T] of a row that is one piece of text: start, start + 1, ..."""
    index = start + jnp.arange(length, dtype=jnp.int32)[None]
    return Positions(index, jnp.ones_like(index), start if isinstance(start, int) else None)


def aligned(q: Positions, k: Positions) -> bool:
    """Whether queries and keys are known to be the same tokens of one piece of text: the order of the arrays is then
    that of the text, and no mask is needed."""
    return q.start is not None and (q.start, q.length) == (k.start, k.length)


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
