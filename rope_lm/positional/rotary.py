"""Encodings that rotate queries and keys: one `rotate`, and frequency vectors."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.positional.base import PositionalEncoding
from rope_lm.positions import Positions
from rope_lm.refusal import Refusal


def frequencies(size: int, base: float) -> Float[Array, "F"]:
    """Radians per token of each of the size/2 planes: base ** (-2i / size) (arXiv 2104.09864, section 3.2.2)."""
    return base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def angles(index: Int[Array, "B T"], frequency: Float[Array, "F"]) -> Float[Array, "B T F"]:
    """Radians, in float32."""
    return index.astype(jnp.float32)[..., None] * frequency


def rotate(x: Float[Array, "B T N H"], angle: Float[Array, "#B T F"]) -> Float[Array, "B T N H"]:
    """Turns the plane of components (i, i + H/2) by angle i (RoFormer, Eq. 34, in the half-split pairing).

    The rotation is computed in float32 and returned in the dtype of x.
    """
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    # Two multiplications by [1 T 1 H] factors and one swap of halves: on the CPU XLA fuses this into one pass.
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Rotary(PositionalEncoding):
    """Rotary position embedding (arXiv 2104.09864, section 3.2). `base` of the frequencies: 10,000 in the paper."""

    def __init__(self, base: float, *, width: int, heads: int, head_size: int, rngs: nnx.Rngs):
        if head_size % 2:
            raise Refusal(
                f"rotary turns pairs of components, the head size {width}/{heads} = {head_size} is odd: "
                "choose model.width and model.heads so that width/heads is even"
            )
        if not base > 1:
            raise Refusal(f"model.position.base={base}: must be above 1 (10000 in the paper)")
        self.base = base
        self.head_size = head_size

    def rotate(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        frequency = frequencies(self.head_size, self.base)
        return rotate(q, angles(q_positions.index, frequency)), rotate(k, angles(k_positions.index, frequency))
