"""The places of our parameters in the tensors of Hugging Face transformers. Numbers are moved, never changed.

"Ours" and "here" refer to rope_lm, "theirs" and "there" to transformers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rope_lm.positional.pairing import order

Numbers = Float[np.ndarray, "..."]


class Heads(NamedTuple):
    """The order of the components of queries, keys and values on the axis that they share in their tensors.

    In ours, q, k and v of one head come first, then those of the next head.
    """

    number: int
    pairing: str | None  # of the components of q and k that turn together (rope_lm.positional.pairing); None: none
    turned: int  # components of a head that turn
    by_part: bool  # True for all of q, then all of k, then all of v

    def here(self, theirs: Float[np.ndarray, "*D three_width"]) -> Float[np.ndarray, "*D three_width"]:
        """Return the components in our order."""
        lead, size = theirs.shape[:-1], theirs.shape[-1] // (3 * self.number)
        parts = theirs.reshape(*lead, *((3, self.number) if self.by_part else (self.number, 3)), size)
        parts = parts.swapaxes(-3, -2) if self.by_part else parts
        return self._ordered(parts, self._places(size)).reshape(theirs.shape)

    def there(self, ours: Float[np.ndarray, "*D three_width"]) -> Float[np.ndarray, "*D three_width"]:
        """Return the components in their order."""
        lead, size = ours.shape[:-1], ours.shape[-1] // (3 * self.number)
        parts = self._ordered(ours.reshape(*lead, self.number, 3, size), np.argsort(self._places(size)))
        return (parts.swapaxes(-3, -2) if self.by_part else parts).reshape(ours.shape)

    def _places(self, size: int) -> np.ndarray:
        """Return the index in their order of each component of a head in our order."""
        return np.arange(size) if self.pairing is None else order(self.pairing, size, self.turned)

    @staticmethod
    def _ordered(parts: Numbers, places: np.ndarray) -> Numbers:
        q, k, v = parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]
        return np.stack([q[..., places], k[..., places], v], axis=-2)


@dataclass(frozen=True)
class Tensor:
    """One of our parameters (per layer, if every layer has it) and the tensors that hold it there."""

    ours: str  # the path in our tree, with dots
    theirs: tuple[str, ...]  # names, {} is the layer; several lie side by side on the output axis
    outer_first: bool = False  # [out, in], as in torch.nn.Linear; ours is [in, out]
    heads: Heads | None = None  # of queries, keys and values

    @property
    def layered(self) -> bool:
        """True if every layer has this parameter."""
        return self.ours.startswith("blocks.")

    def names(self, layer: int) -> list[str]:
        """Return the names of their tensors in a layer."""
        return [name.format(layer) for name in self.theirs]

    def here(self, theirs: list[Numbers]) -> Numbers:
        """Return our parameter, from their tensors."""
        x = np.concatenate(theirs, axis=0 if self.outer_first else -1)
        x = x.T if self.outer_first else x
        return x if self.heads is None else self.heads.here(x)

    def there(self, ours: Numbers) -> list[Numbers]:
        """Return their tensors, from our parameter."""
        x = ours if self.heads is None else self.heads.there(ours)
        return np.split(x.T if self.outer_first else x, len(self.theirs), axis=0 if self.outer_first else -1)
