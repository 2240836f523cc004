"""What is predicted: rows of W = T + 1 tokens to inputs, targets and weights, and the loss in nats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Example(NamedTuple):
    """Inputs, the targets that stand at the same places, and how much each counts (0 or 1)."""

    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


def causal(rows: Int[Array, "B W"]) -> Example:
    """Each token predicts the next one."""
    return Example(rows[:, :-1], rows[:, 1:], jnp.ones(rows[:, 1:].shape, jnp.float32))


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Nats of each target: log sum exp of the logits less the target's, in float32."""
    # A comparison instead of a gather: its gradient is one fused pass, a gather's is a scatter (slow on the CPU).
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0), axis=-1)
