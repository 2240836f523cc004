"""How one parameter of ours lies in the tensors of another layout, and back: no number is computed, only moved."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rope_lm.positional.pairing import order

Numbers = Float[np.ndarray, "..."]


class Heads(NamedTuple):
    """Where the components of queries, keys and values are, on the axis that q, k and v share."""

    count: int
    pairing: str | None  # which components of q and k are turned together (rope_lm.positional.pairing); None: none
    turned: int  # how many of a head's are
    by_part: bool  # all of q, all of k, all of v; ours is by head: q, k and v of one head after another

    def here(self, theirs: Float[np.ndarray, "*D three_width"]) -> Float[np.ndarray, "*D three_width"]:
        """In our order."""
        lead, size = theirs.shape[:-1], theirs.shape[-1] // (3 * self.count)
        parts = theirs.reshape(*lead, *((3, self.count) if self.by_part else (self.count, 3)), size)
        parts = parts.swapaxes(-3, -2) if self.by_part else parts
        return self._ordered(parts, self._places(size)).reshape(theirs.shape)

    def there(self, ours: Float[np.ndarray, "*D three_width"]) -> Float[np.ndarray, "*D three_width"]:
        """In their order."""
        lead, size = ours.shape[:-1], ours.shape[-1] // (3 * self.count)
        parts = ours.reshape(*lead, self.count, 3, size)
        parts = self._ordered(parts, np.argsort(self._places(size)))
        return (parts.swapaxes(-3, -2) if self.by_part else parts).reshape(ours.shape)

    def _places(self, size: int) -> np.ndarray:
        """For each component of a head in our order, its place in theirs."""
        return np.arange(size) if self.pairing is None else order(self.pairing, size, self.turned)

    @staticmethod
    def _ordered(parts: Numbers, places: np.ndarray) -> Numbers:
        q, k, v = parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]
        return np.stack([q[..., places], k[..., places], v], axis=-2)


@dataclass(frozen=True)
class Tensor:
    """One of our parameters, in one layer where it is a layer's, and the tensors that hold it there."""

    ours: str  # the path in our tree, with dots
    theirs: tuple[str, ...]  # names, {} is the layer; several lie side by side on the output axis
    outer_first: bool = False  # [out, in], as torch.nn.Linear has it; ours is [in, out]
    heads: Heads | None = None  # of queries, keys and values

    @property
    def layered(self) -> bool:
        return self.ours.startswith("blocks.")

    def here(self, theirs: list[Numbers]) -> Numbers:
        """Our parameter."""
        x = np.concatenate(theirs, axis=0 if self.outer_first else -1)
        x = x.T if self.outer_first else x
        return x if self.heads is None else self.heads.here(x)

    def there(self, ours: Numbers) -> list[Numbers]:
        """Their tensors."""
        x = ours if self.heads is None else self.heads.there(ours)
        return np.split(x.T if self.outer_first else x, len(self.theirs), axis=0 if self.outer_first else -1)
