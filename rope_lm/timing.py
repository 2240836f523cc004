"""Step times: a compiled step that can be called repeatedly, and rounds in which programs take turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from rope_lm import costs, training
from rope_lm.plan import Plan, initial

Key = TypeVar("Key")


class Stepper:
    """A compiled training step, with a state and one batch that every call reuses."""

    def __init__(self, plan: Plan):
        self.plan, self.state = plan, initial(plan)
        batch = next(plan.data.batches([member.seed for member in plan.members], 0, 1))
        self.rows = jax.device_put(batch.rows, plan.program.rows)
        began = time.perf_counter()
        self.step = plan.program.step.lower(self.state, self.rows).compile()
        self.compile_seconds = time.perf_counter() - began
        self.bytes = costs.memory(self.step)  # on each device

    def __call__(self) -> training.Metrics:
        self.state, metrics = self.step(self.state, self.rows)
        return metrics


def rounds_of(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, np.ndarray]:
    """Return the seconds [rounds] of each call, made in turn (A B C A B C ...) after a warm-up round.

    Taking turns lets a noisy machine affect all calls alike.
    """
    taken = [[_seconds(call) for call in calls.values()] for _ in range(rounds + 1)]
    return dict(zip(calls, np.array(taken[1:]).T, strict=True))


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def seconds_per_step(plan: Plan) -> float:
    """Return the median time of five steps, after compilation and a warm-up. A step updates all members."""
    return float(np.median(rounds_of({"step": Stepper(plan)}, rounds=5)["step"]))
