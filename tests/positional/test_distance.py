"""What hangs on the distance is computed for distances where rows are whole pieces of text, for pairs where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rope_lm import positional
from rope_lm.attention.base import WHOLE
from rope_lm.positional.bias import distances, shifted
from rope_lm.positions import Positions, contiguous, visible
from tests.models import position


def unknown(positions: Positions) -> Positions:
    """The same, not known to be one piece."""
    return Positions(positions.index, positions.segment)


@pytest.mark.parametrize("queries, keys, start", [(1, 1, 0), (5, 3, 0), (3, 5, 2), (4, 4, 9), (2, 6, -7)])
@pytest.mark.parametrize("causal", [True, False])
def test_shifting_finds_each_distance_its_key_and_its_gradient_the_way_back(causal, queries, keys, start):
    where = contiguous(queries, start), contiguous(keys)
    apart, seen = distances(*where, causal), visible(*where, causal)[0]
    x = jax.random.normal(jax.random.key(0), (2, queries, len(apart)))
    place = jnp.array(
        [[max(0, start + t - s) if causal else start + t - s for s in range(keys)] for t in range(queries)]
    )
    place = jnp.broadcast_to(apart[0] - place, (2, queries, keys))
    look_up = lambda x, _: jnp.take_along_axis(x, place, axis=2)  # noqa: E731
    np.testing.assert_array_equal(shifted(x, keys) * seen, look_up(x, keys) * seen)
    weights = seen * jax.random.normal(jax.random.key(1), (2, queries, keys))
    found, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x, keys) * weights))(x) for f in (shifted, look_up))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("queries, keys, start", [(9, 9, 0), (2, 7, 5), (3, 4, 20), (3, 4, -20), (1, 1, 3)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["shaw", "transformer_xl"])
def test_products_by_distance_are_those_of_pairs(name, causal, queries, keys, start):
    """Values and gradients, of all keys that a query sees; vectors are shared from 3 tokens on in Shaw's."""
    shape = positional.Shape(width=8, heads=2, head_size=4, layers=2, causal=causal)
    row = position(name, 16) | ({"max_distance": 3, "scale": 1.0} if name == "shaw" else {"scale": 1.0})
    made = positional.make(row, shape=shape, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(made)
    q, k = (jax.random.normal(jax.random.key(seed), (2, size, 2, 4)) for seed, size in enumerate((queries, keys)))
    whole = contiguous(queries, start), contiguous(keys)
    weights = visible(*whole, causal) * jax.random.normal(jax.random.key(2), (2, 2, queries, keys))

    def score(parameters, q, where):
        made = nnx.merge(graph, parameters)
        return made.score(q, k, *where, made.prepare(*where)[1], [WHOLE])[0] * weights

    found, expected = (score(parameters, q, where) for where in (whole, tuple(map(unknown, whole))))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda *given: score(*given).sum(), argnums=(0, 1))
    found, expected = (gradient(parameters, q, where) for where in (whole, tuple(map(unknown, whole))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
