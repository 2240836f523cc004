"""Step times: rounds in which programs take turns, and a step that can be called over and over."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rope_lm._interim import training
from rope_lm.plan import Plan, initial


class Stepper:
    """A compiled training step with a state and the first batch, called over and over."""

    def __init__(self, plan: Plan):
        self.plan, self.state = plan, initial(plan)
        batch = next(plan.data.batches([member.seed for member in plan.members], 0, 1))
        self.rows = jax.device_put(batch.rows, plan.program.rows)
        began = time.perf_counter()
        self.step = plan.program.step.lower(self.state, self.rows).compile()
        self.compile = time.perf_counter() - began  # seconds
        memory = self.step.memory_analysis()
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + fresh  # of each device

    def __call__(self) -> training.Metrics:
        self.state, metrics = self.step(self.state, self.rows)
        return metrics


def rounds_of(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, np.ndarray]:
    """Seconds [rounds] of each call over rounds A B C A B C, so that a noisy machine hits all alike; one warms up."""
    taken = [[_clock(call) for call in calls.values()] for _ in range(rounds + 1)]
    return dict(zip(calls, np.array(taken[1:]).T, strict=True))


def _clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def seconds_per_step(plan: Plan) -> float:
    """Of all members together: the median of five steps after the first, compilation excluded."""
    return float(np.median(rounds_of({"step": Stepper(plan)}, rounds=5)["step"]))
