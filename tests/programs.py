"""Tiny training programs, for the tests."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.presets import OBJECTIVES
from rope_lm import sharding, training
from tests import models
from tests.models import VOCABULARY, position, section

LENGTH, BATCH = 16, 4
LEARNING_RATE = 1e-2
OPTIMIZER = {
    "name": "adamw",
    "learning_rate": (LEARNING_RATE,),
    "schedule": "constant",
    "warmup": 0.0,
    "cooldown": 0.2,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "epsilon": 1e-8,
    "gradient_clip": 1.0,
    "accumulation_steps": 1,
}

PERFORMER = {**models.PERFORMER, "redraw": 3}  # random features that are drawn again within a test


def smallest(name: str) -> dict[str, Any]:
    """The changes to a model's section that make it the smallest in which an encoding acts."""
    layers = {"layers": 2 if name == "rotary_layered" else 1}
    return layers | ({"attention": PERFORMER} if name == "rotary_features" else {})


def config(
    name: str,
    *,
    model: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    objective: str = "causal",
    batch: int = BATCH,
    length: int = LENGTH,
) -> dict[str, Any]:
    """The sections of a run's config that its program depends on."""
    return {
        "steps": 100,
        "model": {**section(name, position=position(name, length)), **(model or {})},
        "optimizer": {**OPTIMIZER, **(optimizer or {})},
        "objective": {"name": objective, **OBJECTIVES[objective]},
        "data": {"batch": batch, "length": length},
    }


def program(name: str, members: int = 1, mesh: Mesh | None = None, **changes: Any) -> training.Program:
    """The program that trains a tiny model; `changes` as in `config`."""
    mesh = sharding.make(1, 1, 1, 1) if mesh is None else mesh
    return training.make(config(name, **changes), vocabulary=VOCABULARY, members=members, mesh=mesh)


def start(program: training.Program, seeds: tuple[int, ...], rates: tuple[float, ...] = ()) -> training.State:
    """The state at step 0; peak learning rates are LEARNING_RATE unless given."""
    return program.init(np.array(seeds, np.uint32), np.array(rates or (LEARNING_RATE,) * len(seeds), np.float32))


def rows(seed: int, step: int, batch: int = BATCH, length: int = LENGTH) -> np.ndarray:
    """Random rows [batch length+1]."""
    return np.random.default_rng([seed, step]).integers(0, VOCABULARY, (batch, length + 1)).astype(np.int32)


def train(
    program: training.Program, seeds: tuple[int, ...], steps: int, rates: tuple[float, ...] = ()
) -> tuple[training.State, np.ndarray]:
    """Train members, each on the rows of its own seed. Returns the last state and nats [steps members]."""
    state, nats = start(program, seeds, rates), []
    batch, length = program.spec.batch, program.spec.length
    for step in range(steps):
        batches = np.stack([rows(seed, step, batch, length) for seed in seeds])
        state, metrics = program.step(state, jax.device_put(batches, program.rows))
        nats.append(np.asarray(metrics.nats))
    return state, np.array(nats)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their path, copied to the host."""
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
