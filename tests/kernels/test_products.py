"""Matrix products compared with their plain definition, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm.kernels.products import linear, linear_plain, repeated, repeated_plain


@pytest.mark.parametrize("inner, outer", [(12, 20), (16, 16), (20, 12)])
def test_a_linear_map_is_a_product_in_values_and_gradients(inner, outer):
    keys, sizes = jax.random.split(jax.random.key(0), 3), [(8, inner), (inner, outer), (8, outer)]
    x, w, g = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))

    def run(function) -> tuple[jax.Array, ...]:
        value, pull = jax.vjp(jax.jit(function), x, w)
        return value, *pull(g)

    for ours, plain in zip(run(linear), run(linear_plain), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("inner, outer, computed", [(12, 20, "12,20"), (20, 12, "12,20")])
def test_the_gradient_of_weights_is_computed_narrow_side_first(inner, outer, computed):
    """In the compiled program too, because XLA would undo a transposition."""

    def of_weights(x: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(linear, x, w)[1](g)[1]

    given = jnp.ones((8, inner)), jnp.ones((inner, outer)), jnp.ones((8, outer))
    products = [line for line in jax.jit(of_weights).lower(*given).compile().as_text().splitlines() if " dot(" in line]
    assert len(products) == 1 and f"f32[{computed}]" in products[0].split(" dot(")[0]


def test_a_repeated_array_is_a_broadcast_in_values_and_gradients():
    x, g = jax.random.normal(jax.random.key(0), (3, 5)), jax.random.normal(jax.random.key(1), (7, 3, 5))
    ours, plain = (jax.vjp(jax.jit(partial(function, rows=7)), x) for function in (repeated, repeated_plain))
    np.testing.assert_array_equal(ours[0], plain[0])
    np.testing.assert_allclose(ours[1](g)[0], plain[1](g)[0], atol=1e-5)
