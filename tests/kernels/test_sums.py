"""Sums from each key onward, and interpolation, compared with the plain way to compute each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm.kernels.sums import interpolated, neighbors, neighbors_plain, onward, onward_plain

every = pytest.mark.all


@pytest.mark.parametrize("length", [1, 65, 200, *(pytest.param(n, marks=every) for n in (31, 32, 33, 100, 256))])
def test_onward_is_a_cumulative_sum_from_the_end(length):
    x, weights = jax.random.uniform(jax.random.key(0), (2, 3, 2, length))
    np.testing.assert_allclose(jax.jit(onward)(x), onward_plain(x), rtol=1e-6)
    assert onward_plain(x)[0, 0, 0] == pytest.approx(float(x[0, 0].sum()), rel=1e-5), "the sum of all"

    def gradient(function) -> jax.Array:
        return jax.jit(jax.grad(lambda x: jnp.sum(function(x) * weights)))(x)

    found, expected = gradient(onward), gradient(onward_plain)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_neighbors_are_those_of_the_plain_look_up_in_values_and_gradients():
    x, below = jax.random.normal(jax.random.key(0), (2, 3, 5)), jnp.array([[[0, 3, 1, 1, 2, 3]] * 3] * 2)
    weights = jax.random.normal(jax.random.key(1), (2, 2, 3, 6))
    expected = np.stack([np.take_along_axis(np.asarray(x), index, axis=-1) for index in (below, below + 1)])

    def gradient(look_up) -> jax.Array:
        def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = jnp.stack(look_up(x, below))
            return jnp.sum(values * weights), values

        gradient, values = jax.jit(jax.grad(total, has_aux=True))(x)
        np.testing.assert_array_equal(values, expected)
        return gradient

    found, plain = gradient(neighbors), gradient(neighbors_plain)
    np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-6)


def test_interpolation_is_linear_and_its_gradient_goes_to_both_neighbors():
    """At whole positions, the first and the last, and some positions more than once."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    at = jnp.array([0.0, 0.25, 1.0, 1.5, 1.75, 3.0, 3.5, 4.0, 4.0])
    at = jnp.stack([jnp.roll(at, row) for row in range(6)]).reshape(2, 3, 9)
    weights = jax.random.normal(jax.random.key(1), at.shape)

    def hats(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.einsum("bnp,bnps->bns", x, jnp.maximum(0, 1 - jnp.abs(at[:, :, None] - jnp.arange(5.0)[:, None])))

    runs = [jax.jit(jax.value_and_grad(lambda x, f=f: jnp.sum(f(x, at) * weights)))(x) for f in (interpolated, hats)]
    for ours, plain in zip(*runs, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    # The gradient by position is the slope to the next number; the last position has the slope before it.
    slope = jax.jit(jax.grad(lambda at: jnp.sum(interpolated(x, at) * weights)))(at)
    below = np.minimum(np.asarray(at).astype(int), 3)
    left, right = (np.take_along_axis(np.asarray(x), index, axis=-1) for index in (below, below + 1))
    np.testing.assert_allclose(slope, (right - left) * weights, rtol=1e-5, atol=1e-6)
