"""Values by distance: rows known to be contiguous compared with pairs, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm.kernels.shift import by_distance, by_distance_plain, shifted, shifted_plain, with_vectors
from rope_lm.positions import Positions, View, contiguous

every = pytest.mark.all
# Queries, keys, index of the first query.
SIZES = [(1, 1, 0), (3, 5, 2), (2, 6, -7), *(pytest.param(*sizes, marks=every) for sizes in ((5, 3, 0), (4, 4, 9)))]
LONG = [(65, 65, 0), *(pytest.param(*sizes, marks=every) for sizes in ((200, 200, 0), (16, 80, 64), (64, 200, 100)))]


def visible(queries: int, keys: int, start: int, causal: bool) -> tuple[View, jax.Array]:
    view = View(contiguous(queries, start), contiguous(keys), causal)
    return view, view.visible


@pytest.mark.parametrize("queries, keys, start", SIZES + LONG)
@pytest.mark.parametrize("causal", [True, False])
def test_shifting_finds_the_value_of_each_distance_and_its_gradient(causal, queries, keys, start):
    view, seen = visible(queries, keys, start, causal)
    # The value of a distance is that distance: every pair gets its own.
    by_distance = jnp.broadcast_to(jnp.asarray(view.distances, float), (2, queries, len(view.distances)))

    x = jax.random.normal(jax.random.key(0), (2, queries, len(view.distances)))
    weights = seen * jax.random.normal(jax.random.key(1), (2, queries, keys))

    def run(function) -> list[jax.Array]:
        def weighted(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = function(x, keys)
            return jnp.sum(values * weights), (values * seen, function(by_distance, keys) * seen)

        gradient, (values, distances) = jax.jit(jax.grad(weighted, has_aux=True))(x)
        np.testing.assert_array_equal(distances, np.broadcast_to(view.distance * seen, distances.shape))
        return [values, gradient]

    for ours, plain in zip(run(shifted), run(shifted_plain), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
    "queries, keys, start",
    [
        (9, 9, 0),
        (2, 7, 5),
        (3, 4, -20),
        *(pytest.param(*sizes, marks=every) for sizes in ((3, 4, 20), (1, 1, 3))),
        *LONG,
    ],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "distances", [range(3, -4, -1), *(pytest.param(x, marks=every) for x in (range(3, -1, -1), range(20, 1, -1)))]
)
def test_products_by_distance_are_those_of_pairs(distances, causal, queries, keys, start):
    """Compare all keys that a query sees. Distances beyond either end share a vector."""
    known, seen = visible(queries, keys, start, causal)
    unknown = View(*(Positions(at.index, at.segment) for at in (known.q, known.k)), causal)
    q = jax.random.normal(jax.random.key(0), (2, queries, 2, 4))
    vectors = jax.random.normal(jax.random.key(1), (2, 4, len(distances)))
    weights = seen[:, None] * jax.random.normal(jax.random.key(2), (2, 2, queries, keys))

    def run(function, view: View) -> list[jax.Array]:
        def weighted(q: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
            products = function(q, vectors, distances, view) * weights
            return products.sum(), products

        (_, products), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(q, vectors)
        return [products, *gradients]

    for ours, plain in zip(run(by_distance, known), run(by_distance, unknown), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=2e-5)


def test_products_of_pairs_are_those_written_out():
    view, _ = visible(4, 6, 3, causal=False)
    q, vectors = jax.random.normal(jax.random.key(0), (2, 4, 2, 3)), jax.random.normal(jax.random.key(1), (2, 3, 5))
    found = by_distance_plain(q, vectors, range(2, -3, -1), view)
    for row, head, i, j in np.ndindex(2, 2, 4, 6):
        vector = vectors[head, :, 2 - np.clip(3 + i - j, -2, 2)]
        assert found[row, head, i, j] == pytest.approx(float(np.dot(q[row, i, head], vector)), abs=1e-5)
    np.testing.assert_allclose(with_vectors(q, vectors), jnp.einsum("btnh,nhr->bntr", q, vectors), atol=1e-5)
