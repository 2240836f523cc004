"""Positions of tokens, and which queries may see which keys."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Part = tuple[slice, slice]  # some queries and some keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Positions:
    """Positions of the tokens of each row. A leading dimension of 1 means "the same in every row"."""

    index: Int[Array, "B T"]  # tokens since the start of the token's own document
    segment: Int[Array, "B T"]  # number of the token's document within its row; 0 is padding
    memory: Any = None  # returned by `PositionalEncoding.remember`: a tree of arrays [B T ...]
    # First index, if every row is one contiguous piece of text. Static, so distances and masks are known when tracing.
    start: int | None = field(default=None, metadata={"static": True})

    @property
    def length(self) -> int:
        """Number of tokens per row."""
        return self.index.shape[1]

    def __getitem__(self, tokens: slice) -> "Positions":
        """Return the positions of some tokens of every row."""
        memory = jax.tree.map(lambda x: x[:, tokens], self.memory)
        if self.start is None or tokens.step not in (None, 1):
            return Positions(self.index[:, tokens], self.segment[:, tokens], memory)
        part = range(*tokens.indices(self.length))  # recomputed, so that XLA sees equal parts as equal
        return replace(contiguous(len(part), self.start + part.start), memory=memory)


def contiguous(length: int, start: int | Int[Array, ""] = 0) -> Positions:
    """Return the positions [1 T] of one piece of text: start, start + 1, ..."""
    index = start + jnp.arange(length, dtype=jnp.int32)[None]
    return Positions(index, jnp.ones_like(index), start=start if isinstance(start, int) else None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """Positions of queries and keys in attention. Kernels cut a view into parts; to an encoding each part is a view."""

    q: Positions
    k: Positions
    causal: bool = field(metadata={"static": True})  # True if no query sees a key after it

    def __getitem__(self, part: Part) -> "View":
        """Return the view of some queries on some keys."""
        queries, keys = part
        return View(self.q[queries], self.k[keys], self.causal)

    @property
    def distance(self) -> Int[Array, "B T S"]:
        """Query index minus key index, in tokens: how far back the key lies."""
        return self.q.index[:, :, None] - self.k.index[:, None, :]

    @property
    def visible(self) -> Bool[Array, "B T S"]:
        """Mask of the keys that each query may attend to: those of its document and, if causal, not after it.

        Causality compares positions, never array offsets. Padding has segment 0, which no other document has.
        """
        same = self.q.segment[:, :, None] == self.k.segment[:, None, :]
        return same & (self.distance >= 0) if self.causal else same

    @property
    def aligned(self) -> bool:
        """True if queries and keys are the same tokens of one piece of text, so that no mask is needed."""
        return self.q.start is not None and (self.q.start, self.q.length) == (self.k.start, self.k.length)

    @property
    def distances(self) -> range | None:
        """Distances between queries and keys in the order that `kernels.shift.shifted` expects: farthest first.

        They begin one beyond the farthest, as its reshaping requires. A causal view leaves out distances to keys that
        no query sees. None if the rows are not known to be contiguous.
        """
        if self.q.start is None or self.k.start is None:
            return None
        beyond = self.q.start + self.q.length - self.k.start
        count = self.q.length + self.k.length
        if self.causal:
            count = min(max(beyond + 1, self.k.length + 1), count)
        return range(beyond, beyond - count, -1)
