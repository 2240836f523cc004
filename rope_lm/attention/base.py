"""The interface of attention: from queries, keys and values to outputs, once positions have acted on them."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from rope_lm.kernels.softmax import WHOLE, Added
from rope_lm.positional import Effects
from rope_lm.positions import Part, View

# What an encoding does to the features of queries and keys. One that does nothing returns the same arrays.
Turn = Callable[
    [Float[Array, "B T N F"], Float[Array, "B S N F"]], tuple[Float[Array, "B T N F"], Float[Array, "B S N F"]]
]


class Attention:
    """One way to attend. It has no parameters; whatever is random in it is passed in (`draw`)."""

    redraw: int = 0  # steps between draws of its random numbers; 0 if it has none

    def check(self, name: str, effects: Effects) -> None:
        """Raise Refusal for the encoding `name` if it acts where this attention has no such place."""

    def draw(self, key: jax.Array, layers: int, head_size: int) -> Float[Array, "L F H"] | None:
        """Return its random numbers for every layer; None if it has none. `head_size` of queries and keys."""
        return None

    def parts(self, view: View) -> list[Part]:
        """Return the parts of the matrix of logits that are computed one at a time."""
        return [WHOLE]

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N E"],
        view: View,
        added: Added | None,
        turn: Turn,
        drawn: Float[Array, "F H"] | None,
    ) -> Float[Array, "B T N E"]:
        """Return each query's weighted sum of the values of the keys that it sees (`View.visible`).

        `added`: what positions add to the logits of each of `parts`. The output is named "product", so that it is kept
        for the backward pass (`transformer.REMAT`).
        """
        raise NotImplementedError

    def weights(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        view: View,
        added: Added | None,
        turn: Turn,
        drawn: Float[Array, "F H"] | None,
    ) -> Float[Array, "B N T S"]:
        """Return the weights, given `added` for the whole matrix. In linear attention they may be negative."""
        raise NotImplementedError
