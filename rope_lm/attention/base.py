"""The interface of attention: outputs from queries, keys and values that the encoding has already acted on."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from rope_lm.kernels.softmax import WHOLE, Added
from rope_lm.positional import Effects
from rope_lm.positions import Part, View

# The `turn_features` of an encoding: features of queries and keys -> the same, rotated. Mostly the identity.
Turn = Callable[
    [Float[Array, "B T N F"], Float[Array, "B S N F"]], tuple[Float[Array, "B T N F"], Float[Array, "B S N F"]]
]


class Attention:
    """One kind of attention. It has no parameters. Its random numbers, if any, come from `draw` and are passed in."""

    redraw: int = 0  # steps between draws of its random numbers; 0 if it has none

    def check(self, name: str, effects: Effects) -> None:
        """Raise Refusal if the encoding `name` acts on something that this attention lacks, such as logits."""

    def draw(self, key: jax.Array, layers: int, head_size: int) -> Float[Array, "L F H"] | None:
        """Return random numbers for every layer; None if none are needed. `head_size`: that of queries and keys."""
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

        `added`: biases and scores to add to the logits, one array for each of `parts`. `turn`: the encoding's
        `turn_features`. `drawn`: one layer of `draw`. The output is named "product", so that it is kept for the
        backward pass (`transformer.REMAT`).
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
