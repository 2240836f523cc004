"""The interface of every attention: what queries, keys and values become, once position has acted on them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from rope_lm.positional import Added, Parts, PositionalEncoding
from rope_lm.positions import Positions

# What an encoding does to the features of queries and keys, where the attention has features.
Turn = Callable[
    [Float[Array, "B T N F"], Float[Array, "B S N F"]], tuple[Float[Array, "B T N F"], Float[Array, "B S N F"]]
]

WHOLE = slice(None), slice(None)  # all queries, all keys


class Attention:
    """One way to attend. It has no parameters; what it draws at random is given to it (`draw`)."""

    kernel: str  # what computes it
    redraw: int = 0  # steps after which what is random in it is drawn again; 0 where nothing is

    @staticmethod
    def resolve(section: Mapping[str, Any], platform: str, dtype: str, added: str, head_size: int) -> dict[str, Any]:
        """The config section with everything decided that hangs on the platform. `added` to the logits is "nothing",
        "one" for all rows that are computed at once, or "many"."""
        return dict(section)

    @classmethod
    def check(cls, name: str, encoding: type[PositionalEncoding]) -> None:
        """Raises Refusal, by its name, for an encoding that acts where this attention has no such place."""

    def in_turn(self, encoding: type[PositionalEncoding]) -> bool:
        """Whether members cannot be computed at once: what each adds to its logits has to be one for all rows."""
        return False

    def draw(self, key: jax.Array, layers: int, head_size: int) -> Float[Array, "L F H"] | None:
        """What is random in it, of every layer; None where nothing is."""
        return None

    def flops(self, width: int, heads: int, length: int, causal: bool, turned: bool) -> float:
        """Multiplications that one token costs in one layer, forward, over the keys that it may see alone; `turned`:
        where features are turned in the numerator."""
        raise NotImplementedError

    def floats(self, heads: int, length: int, causal: bool) -> float:
        """Numbers in float32 for each token that one layer works on, forward and backward, from its queries, keys and
        values to what is gathered."""
        return 0

    def parts(self, q_positions: Positions, k_positions: Positions, causal: bool) -> Parts:
        """The parts of the matrix of logits that are computed one at a time."""
        return [WHOLE]

    def keys(self, length: int, causal: bool) -> float:
        """Keys that are computed for each query of a row, on average, whether or not it sees them."""
        return length

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N E"],
        q_positions: Positions,
        k_positions: Positions,
        bias: Added | None,
        turn: Turn | None,
        causal: bool,
        drawn: Float[Array, "F H"] | None,
    ) -> Float[Array, "B T N E"]:
        """What each query gathers from the values of the keys that it sees (`rope_lm.positions.visible`).

        `bias` is of each of `parts`; it and `turn` are None where the encoding does not act on logits, or on features.
        What is gathered is named "product", so that it is kept for the backward pass (`transformer.REMAT`).
        """
        raise NotImplementedError
