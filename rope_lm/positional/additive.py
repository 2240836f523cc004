"""Encodings that act on the token embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rope_lm.positional.base import PositionalEncoding, Shape, parameter
from rope_lm.positional.rotary import Rotary, above, angles, frequencies
from rope_lm.positions import Positions
from rope_lm.refusal import Refusal


class Learned(PositionalEncoding):
    """One trained vector per index, added to the embeddings (Gehring et al. 2017, arXiv 1705.03122, section 3.1).

    `limit`: number of vectors, in tokens. `scale`: standard deviation of their initial values. A scale of 0.02 beside
    unit-variance token embeddings trains visibly slower than 1.0, so the choice is part of the config.
    """

    def __init__(self, limit: int, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        if limit < 1:
            raise Refusal(f"model.position.limit={limit}: must be at least 1, the number of positions to learn")
        self.limit = limit
        self.table = parameter(scale * jax.random.normal(rngs.position(), (limit, shape.width)), "position", "width")

    def embed(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T D"]:
        # JAX clamps an index out of range silently. A row of NaN cannot go unseen.
        row = self.table[...].at[positions.index].get(mode="fill", fill_value=jnp.nan)
        return x + row.astype(x.dtype)


class Sinusoidal(PositionalEncoding):
    """Sines and cosines of geometric frequencies, added to the embeddings (arXiv 1706.03762, section 3.5).

    `base` of the frequencies (10,000 in the paper); `scale`: amplitude of each sine. Sines fill the first half of the
    width and cosines the second: the paper's interleaving is a permutation of the width.
    """

    def __init__(self, base: float, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        self.scale = scale
        self.width = shape.width
        self.base = above("base", base, 1, "10000 in the paper")

    def embed(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T D"]:
        angle = angles(positions.index, frequencies(self.width + self.width % 2, self.base))
        wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., : self.width]
        return x + (self.scale * wave).astype(x.dtype)


class RotarySinusoidal(Rotary):
    """Rotary, with sinusoids added to the embeddings.

    The code that RoFormer cites for its Performer experiment ran this: `rotary_position_emb` of
    lucidrains/performer-pytorch leaves the sinusoids in place.
    """

    def __init__(self, base: float, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(base, shape=shape, rngs=rngs)
        self.sinusoidal = Sinusoidal(base, scale, shape=shape, rngs=rngs)

    def embed(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T D"]:
        return self.sinusoidal.embed(x, positions)
