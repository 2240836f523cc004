"""Optimizers and learning-rate schedules."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import build

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]  # step -> fraction of the peak learning rate, in [0, 1]


def _constant(t: Float[Array, ""], cooldown: float) -> Float[Array, ""]:
    return jnp.ones_like(t)


def _cosine(t: Float[Array, ""], cooldown: float) -> Float[Array, ""]:
    return 0.5 * (1 + jnp.cos(jnp.pi * t))


def _wsd(t: Float[Array, ""], cooldown: float) -> Float[Array, ""]:
    """Warm-up, stable, decay (arXiv 2404.06395, section 4): linear towards zero over the last `cooldown`."""
    return jnp.clip((1 - t) / max(cooldown, 1e-9), 0, 1)


# The fraction of the peak after warm-up. t is the fraction of the remaining steps that are done: 0 at the first of
# them, one step short of 1 at the last.
SCHEDULES: dict[str, Callable[[Float[Array, ""], float], Float[Array, ""]]] = {
    "constant": _constant,
    "cosine": _cosine,
    "wsd": _wsd,
}


class Optimizer(NamedTuple):
    """A gradient transformation and a schedule. They are separate because members may have different peak rates."""

    transform: optax.GradientTransformation  # gradient -> direction of descent
    schedule: Schedule
    learning_rate: tuple[float, ...]  # peaks
    accumulation_steps: int  # equal pieces that a batch is cut into


def adamw(
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
    decays: Callable[[Any], Any],
) -> Optimizer:
    """Build AdamW: global-norm clipping, Adam (arXiv 1412.6980) and decoupled weight decay (arXiv 1711.05101).

    `learning_rate`: peak rates; the ensemble has a member for each pair of seed and peak. `warmup`: fraction of
    `steps`. `cooldown`: fraction of the steps after the warm-up. `decays(params)`: a tree that is True for parameters
    with weight decay. Raises Refusal for values out of range.
    """
    fractions = {"warmup": warmup, "cooldown": cooldown, "b1": b1, "b2": b2}
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise Refusal(f"optimizer.{name}={value}: must be at least 0 and below 1")
    positive = {
        "learning_rate": min(learning_rate),
        "epsilon": epsilon,
        "gradient_clip": gradient_clip,
        "accumulation_steps": accumulation_steps,
    }
    for name, value in positive.items():
        if not value > 0:
            raise Refusal(f"optimizer.{name}={value}: must be above 0")
    if len({float(jnp.float32(rate)) for rate in learning_rate}) < len(learning_rate):
        raise Refusal(
            f"optimizer.learning_rate={tuple(learning_rate)}: each may be given once; equal ones are the same run twice"
        )
    if not 0 <= weight_decay < float("inf"):
        raise Refusal(f"optimizer.weight_decay={weight_decay}: must be at least 0")
    transform = optax.chain(
        optax.clip_by_global_norm(gradient_clip),
        optax.scale_by_adam(b1, b2, epsilon),
        optax.add_decayed_weights(weight_decay, mask=decays),
    )
    fraction = warmup_then(schedule, round(warmup * steps), steps, cooldown)
    return Optimizer(transform, fraction, learning_rate, accumulation_steps)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": adamw}


def make(optimizer: Mapping[str, Any], *, steps: int, decays: Callable[[Any], Any]) -> Optimizer:
    """Build the optimizer that a config's section describes: its name and its function's keyword arguments.

    Raises Refusal for an unknown name, an unknown or missing key, or a value out of range.
    """
    return build(optimizer, OPTIMIZERS, "optimizer", {"steps": steps, "decays": decays})


def warmup_then(schedule: str, warmup: int, steps: int, cooldown: float) -> Schedule:
    """Return a linear warm-up of some steps, then a row of SCHEDULES. Raises Refusal for an unknown name."""
    if schedule not in SCHEDULES:
        raise unknown("optimizer.schedule", schedule, SCHEDULES)
    ramp = max(1, warmup)

    def fraction(step: Int[Array, ""]) -> Float[Array, ""]:
        step = step.astype(jnp.float32)
        rest = SCHEDULES[schedule](jnp.clip((step - ramp) / max(1, steps - ramp), 0, 1), cooldown)
        return jnp.where(step < ramp, (step + 1) / ramp, rest)

    return fraction
