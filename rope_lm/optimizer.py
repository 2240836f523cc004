"""AdamW with a clipped gradient, and the shapes that a learning rate takes over a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rope_lm.refusal import Refusal, unknown

Shape = Callable[[Float[Array, ""], float], Float[Array, ""]]

# How the rate goes on after the warm-up, as a fraction of the peak: f(t, cooldown), t the fraction of the steps after
# it that are done: 0 at the first of them, one step short of 1 at the last.
SCHEDULES: dict[str, Shape] = {
    "constant": lambda t, cooldown: jnp.ones_like(t),
    "cosine": lambda t, cooldown: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    # warm-up, stable, decay (arXiv 2404.06395, section 4): linear towards zero over the last `cooldown` of those steps
    "wsd": lambda t, cooldown: jnp.clip((1 - t) / max(cooldown, 1e-9), 0, 1),
}


class Optimizer(NamedTuple):
    """Directions and the rate's shape, kept apart because members of an ensemble differ in their peak rate."""

    transform: optax.GradientTransformation  # gradient -> direction of descent
    schedule: Callable[[Int[Array, ""]], Float[Array, ""]]  # step -> fraction of the peak rate, in [0, 1]
    accumulation_steps: int  # pieces that the batch of a step is cut into


def make(
    learning_rate: tuple[float, ...],
    schedule: str,
    warmup: float,
    cooldown: float,
    weight_decay: float,
    b1: float,
    b2: float,
    epsilon: float,
    gradient_clip: float,
    accumulation_steps: int,
    *,
    steps: int,
    decays: Any,
) -> Optimizer:
    """Global-norm clip, Adam (arXiv 1412.6980), decoupled decay (arXiv 1711.05101) where the tree `decays` is True.

    `learning_rate`: peak learning rates, one member of the ensemble for each seed and each of them. `warmup`: fraction of
    `steps`; `cooldown`: of those after the warm-up. Raises Refusal for values outside their range.
    """
    if schedule not in SCHEDULES:
        raise unknown("optimizer.schedule", schedule, SCHEDULES)
    limits = {"warmup": (warmup, 0, 1), "cooldown": (cooldown, 0, 1), "b1": (b1, 0, 1), "b2": (b2, 0, 1)}
    for name, (value, low, high) in limits.items():
        if not low <= value < high:
            raise Refusal(f"optimizer.{name}={value}: must be at least {low} and below {high}")
    for name, value in [
        ("learning_rate", min(learning_rate)),
        ("epsilon", epsilon),
        ("gradient_clip", gradient_clip),
        ("accumulation_steps", accumulation_steps),
    ]:
        if not value > 0:
            raise Refusal(f"optimizer.{name}={value}: must be above 0")
    if not 0 <= weight_decay < float("inf"):
        raise Refusal(f"optimizer.weight_decay={weight_decay}: must be at least 0")
    ramp = max(1, round(warmup * steps))

    def shape(step: Int[Array, ""]) -> Float[Array, ""]:
        step = step.astype(jnp.float32)
        rest = SCHEDULES[schedule](jnp.clip((step - ramp) / max(1, steps - ramp), 0, 1), cooldown)
        return jnp.where(step < ramp, (step + 1) / ramp, rest)

    transform = optax.chain(
        optax.clip_by_global_norm(gradient_clip),
        optax.scale_by_adam(b1, b2, epsilon),
        optax.add_decayed_weights(weight_decay, mask=decays),
    )
    return Optimizer(transform, shape, accumulation_steps)
