"""Softmax attention."""

from jaxtyping import Array, Float

from rope_lm.attention.base import Attention, Turn
from rope_lm.kernels import softmax
from rope_lm.kernels.softmax import KERNELS, Added
from rope_lm.positional import Effects
from rope_lm.positions import Part, View
from rope_lm.refusal import Refusal, unknown


class Softmax(Attention):
    """softmax(q k / sqrt(H) + added) v (arXiv 1706.03762, section 3.2.1), H the model's head size.

    `kernel`: a name in `kernels.softmax.KERNELS`. `execution.choose` replaces "auto" by one of them. Raises Refusal for
    any other name.
    """

    def __init__(self, kernel: str, *, head_size: int):
        if kernel not in KERNELS:
            raise unknown("model.attention.kernel", kernel, ["auto", *KERNELS])
        self.kernel, self.scale = kernel, head_size**-0.5

    def check(self, name: str, effects: Effects) -> None:
        if effects.features:
            raise Refusal(
                f"model.position.name={name} turns the features of linear attention, softmax attention has none: "
                "choose attention=performer, or another encoding"
            )

    def parts(self, view: View) -> list[Part]:
        return softmax.parts(self.kernel, view)

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
        return KERNELS[self.kernel](q, k, v, view, added, self.scale)

    def weights(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        view: View,
        added: Added | None,
        turn: Turn,
        drawn: Float[Array, "F H"] | None,
    ) -> Float[Array, "B N T S"]:
        return softmax.weights(q, k, view, added, self.scale)
