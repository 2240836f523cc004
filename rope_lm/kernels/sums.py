"""Sums from each key onward, and interpolation at real positions, as CoPE needs them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rope_lm.kernels.products import einsum

PIECE = 32  # keys whose sums are one product in `onward`


def onward_plain(x: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """Return the sum of each number and all numbers after it."""
    return jnp.cumsum(x[..., ::-1], axis=-1)[..., ::-1]


def onward(x: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """Compute `onward_plain` by products with triangular matrices: one within pieces, one over pieces.

    With a cumulative sum, XLA would not reuse the forward pass's result in the backward pass, and would recompute
    everything that depends on it.
    """
    batch, length = x.shape[:-1], x.shape[-1]
    if short := -length % PIECE:
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, short)])
    pieces = x.reshape(*batch, -1, PIECE)
    within = einsum("...cs,sk->...ck", pieces, jnp.tri(PIECE))
    after = einsum("...c,ck->...k", within[..., 0], jnp.tri(pieces.shape[-2], k=-1))
    return (within + after[..., None]).reshape(x.shape)[..., :length]


def neighbors_plain(x: Float[Array, "*B P"], below: Int[Array, "*B S"]) -> tuple[Array, Array]:
    """Return x[below] and x[below + 1] of each row, [*B S] each."""
    return jnp.take_along_axis(x, below, axis=-1), jnp.take_along_axis(x, below + 1, axis=-1)


def neighbors(x: Float[Array, "*B P"], below: Int[Array, "*B S"]) -> tuple[Array, Array]:
    """Compute `neighbors_plain` with one look-up of complex pairs: its gradient is a scatter, slow on a CPU."""
    pairs = jax.lax.complex(x[..., :-1], x[..., 1:])
    first = pairs.shape[-1] * jnp.arange(pairs.size // pairs.shape[-1]).reshape(*pairs.shape[:-1], 1)
    found = pairs.reshape(-1).at[(first + below).reshape(-1)].get(mode="promise_in_bounds").reshape(below.shape)
    return found.real, found.imag


def interpolated(x: Float[Array, "*B P"], at: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """Return x at real positions from 0 to P - 1 of each row, interpolated linearly between whole positions."""
    below = jnp.minimum(at.astype(jnp.int32), x.shape[-1] - 2)
    fraction = at - below
    left, right = jax.lax.platform_dependent(x, below, cpu=neighbors, default=neighbors_plain)
    return left * (1 - fraction) + right * fraction
