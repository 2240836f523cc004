"""The forget gate, compared with its definition written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm.positions import View
from tests.models import encoding, packed
from tests.positional.test_laws import remembering


def test_logits_fall_by_the_log_gates_after_a_key_up_to_the_query():
    """arXiv 2503.02130, section 3; gates of another document do not count."""
    made = encoding({"name": "forgetting", "gate_bias": 0.5}, layer=1)
    made.offset[...] = jax.random.normal(jax.random.key(0), (4,))
    x = jax.random.normal(jax.random.key(1), (1, 7, 32))
    at = packed(jnp.array([[1, 1, 1, 2, 2, 2, 2]]))
    q = jax.random.normal(jax.random.key(2), (1, 7, 4, 8))
    found = made.score(q, q, remembering(made, x, View(at, at, True)))
    gates = 1 / (1 + np.exp(-(np.asarray(x[0]) @ np.asarray(made.weight[...]) + np.asarray(made.offset[...]))))
    for first, last in ((0, 3), (3, 7)):
        for i in range(first, last):
            for j in range(first, i + 1):
                expected = np.log(gates[j + 1 : i + 1]).sum(0)
                assert found[0, :, i, j] == pytest.approx(expected, abs=1e-5)
