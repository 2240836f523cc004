"""Optimizers: the table, the schedules, the update itself, mistakes in the section."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm import optimizer
from rope_lm.refusal import Refusal
from tests.programs import OPTIMIZER, program


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.1, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.1, 1.0, 0.5 * (1 + np.cos(np.pi * 40 / 90)), 0.5 * (1 + np.cos(np.pi * 80 / 90)), 0.0]),
        ("wsd", [0.1, 1.0, 1.0, (10 / 90) / 0.2, 0.0]),
    ],
)
def test_schedules(schedule, expected):
    chosen = optimizer.make(OPTIMIZER | {"schedule": schedule, "warmup": 0.1}, steps=100, decays=lambda params: True)
    np.testing.assert_allclose([chosen.schedule(jnp.int32(step)) for step in (0, 9, 50, 90, 100)], expected, atol=1e-6)


def test_adamw_is_the_papers():
    """Two steps of arXiv 1711.05101, algorithm 2, written out in float64, on a clipped and an unclipped gradient."""
    chosen = optimizer.make(
        OPTIMIZER | {"weight_decay": 0.1, "epsilon": 1e-3}, steps=10, decays=lambda params: {"a": True, "b": False}
    )
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    state = chosen.transform.init(params)
    first, second = 0.0, 0.0
    for step, gradient in enumerate([np.array([3.0, 0.0, 4.0]), np.array([0.1, -0.2, 0.3])], 1):
        given = {"a": jnp.asarray(gradient[:2], jnp.float32), "b": jnp.asarray(gradient[2:], jnp.float32)}
        direction, state = chosen.transform.update(given, state, params)
        gradient = gradient / max(1.0, np.linalg.norm(gradient))
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        expected = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.95**step)) + 1e-3)
        expected[:2] += 0.1 * np.array([1.0, -2.0])
        np.testing.assert_allclose(np.concatenate(jax.tree.leaves(direction)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "adam"}, "unknown optimizer.name 'adam': did you mean adamw"),
        ({"schedule": "cosin"}, "unknown optimizer.schedule 'cosin': did you mean cosine"),
        ({"learning_rate": (0.0,)}, "optimizer.learning_rate=0.0: must be above 0"),
        ({"learning_rate": ()}, "optimizer.learning_rate=.*must be one or more values, each a finite number"),
        ({"warmup": 1.0}, "optimizer.warmup=1.0: must be at least 0 and below 1"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay=nan: must be a finite number"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1: must be at least 0"),
        ({"gradient_clip": 0.0}, "optimizer.gradient_clip=0.0: must be above 0"),
        ({"accumulation_steps": True}, "optimizer.accumulation_steps=True: must be a whole number"),
        ({"accumulation_steps": 3}, "data.batch = 4 cannot be cut into optimizer.accumulation_steps = 3"),
    ],
)
def test_a_mistake_in_the_optimizer_is_one_line(change, words):
    with pytest.raises(Refusal, match=words):
        program("none", optimizer=change)


def test_a_section_without_a_name_is_refused():
    section = {key: value for key, value in OPTIMIZER.items() if key != "name"}
    with pytest.raises(Refusal, match="optimizer has no name: give one of adamw"):
        optimizer.make(section, steps=1, decays=lambda params: True)
