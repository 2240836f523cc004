"""The two steps of contextual positions, each against the plain way to compute it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm.positional.content import between, neighbours, neighbours_in_pairs, onward


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 256])
def test_onward_is_a_cumulative_sum_from_the_end(length):
    x, weights = jax.random.uniform(jax.random.key(0), (2, 3, 2, length))
    plain = lambda x: jax.lax.cumsum(x, axis=2, reverse=True)  # noqa: E731
    np.testing.assert_allclose(onward(x), plain(x), rtol=1e-6)
    found, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x) * weights))(x) for f in (onward, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_neighbours_are_the_same_on_every_platform():
    x, below = jax.random.normal(jax.random.key(0), (2, 3, 5)), jnp.array([[[0, 3, 1, 1, 2, 3]] * 3] * 2)
    weights = jax.random.normal(jax.random.key(1), (2, 2, 3, 6))
    expected = np.stack([np.take_along_axis(np.asarray(x), each, axis=-1) for each in (below, below + 1)])
    for way in (neighbours, neighbours_in_pairs):
        np.testing.assert_array_equal(jnp.stack(way(x, below)), expected)
    found, plain = (
        jax.grad(lambda x, way=way: jnp.sum(jnp.stack(way(x, below)) * weights))(x)
        for way in (neighbours_in_pairs, neighbours)
    )
    np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-6)


def test_between_interpolates_and_its_gradient_goes_to_both_neighbours():
    """Among the places: whole ones, the first and the last, and some more than once."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    at = jnp.array([0.0, 0.25, 1.0, 1.5, 1.75, 3.0, 3.5, 4.0, 4.0])
    at = jnp.stack([jnp.roll(at, row) for row in range(6)]).reshape(2, 3, 9)
    weights = jax.random.normal(jax.random.key(1), at.shape)

    def hats(x, at):
        return jnp.einsum("bnp,bnps->bns", x, jnp.maximum(0, 1 - jnp.abs(at[:, :, None] - jnp.arange(5.0)[:, None])))

    of = lambda f: jax.value_and_grad(lambda x: jnp.sum(f(x, at) * weights))  # noqa: E731
    found, expected = of(between)(x), of(hats)(x)
    for mine, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-5, atol=1e-6)
    # By its place: the slope to the next of x, but for the last, whose place is held there.
    slope = jax.grad(lambda at: jnp.sum(between(x, at) * weights))(at)
    below = np.minimum(np.asarray(at).astype(int), 3)
    pick = lambda index: np.take_along_axis(np.asarray(x), index, axis=-1)  # noqa: E731
    np.testing.assert_allclose(slope, (pick(below + 1) - pick(below)) * weights, rtol=1e-5, atol=1e-6)
