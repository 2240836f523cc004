"""The rotation itself: norms, distances, the paper's matrix, precision."""

import hypothesis
import hypothesis.strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm.positional.rotary import angles, frequencies, rotate, steps, upper_bound, wave

few = hypothesis.settings(max_examples=20)
place = hypothesis.strategies.integers(0, 100_000)
planes = hypothesis.strategies.sampled_from([1, 4, 32])  # few sizes, because each is compiled
base = hypothesis.strategies.floats(2, 1e7)


@jax.jit
def turned(x: jax.Array, index: jax.Array, per_token: jax.Array) -> jax.Array:
    return rotate(x, wave(angles(index, per_token)))


@few
@hypothesis.given(place, planes, base, hypothesis.strategies.integers(0, 2**31 - 1))
def test_rotation_preserves_norms(start, planes, base, seed):
    x = jax.random.normal(jax.random.key(seed), (2, 8, 4, 2 * planes))
    index = jnp.arange(start, start + 8)[None]
    found = np.asarray(turned(x, index, steps(frequencies(2 * planes, base))))
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    assert start == 0 or np.abs(found - x).max() > 1e-3


@few
@hypothesis.given(place, place, place, planes, base)
def test_a_rotated_product_depends_on_the_distance_alone(first, second, shift, planes, base):
    q, k = jax.random.normal(jax.random.key(planes), (2, 1, 1, 1, 2 * planes))
    per_token = steps(frequencies(2 * planes, base))

    def product(shift: int) -> float:
        both = [turned(x, jnp.array([[at + shift]]), per_token) for x, at in ((q, first), (k, second))]
        return float(np.vdot(*both))

    np.testing.assert_allclose(product(0), product(shift), atol=2e-3 * planes)


@pytest.mark.parametrize("index", [1, 1023, 1024, 99_999, 1_000_000, 2_000_000])
def test_angles_are_right_to_a_milliradian_at_a_million(index):
    exact = np.float64(index) * frequencies(64, 1e4)
    ours = np.asarray(angles(jnp.array([[index]]), frequencies(64, 1e4))[0, 0], np.float64)
    off = np.abs(np.exp(1j * ours) - np.exp(1j * exact)).max()
    assert off < 1e-3
    naive = np.float32(index) * frequencies(64, 1e4).astype(np.float32)
    assert index < 1_000_000 or np.abs(np.exp(1j * naive.astype(np.float64)) - np.exp(1j * exact)).max() > 1e-2


def test_the_bound_on_the_score_of_two_tokens_decays_with_their_distance():
    """RoFormer, section 3.4.3."""
    bound = upper_bound(frequencies(128, 1e4), np.arange(0, 257))
    assert bound[0] == pytest.approx(32.5) and bound[1] < bound[0]
    windows = bound[1:].reshape(8, 32).mean(1)
    assert (np.diff(windows) < 0).all(), "on average, every 32 tokens farther"


def test_rotation_is_the_papers_matrix():
    """RoFormer Eq. 15: a block-diagonal matrix of plane rotations; here plane i is components (i, i + H/2)."""
    size, at = 6, 7
    matrix = np.zeros((size, size))
    for i in range(size // 2):
        angle = at * 10000 ** (-2 * i / size)
        plane = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        matrix[np.ix_([i, i + size // 2], [i, i + size // 2])] = plane
    x = np.random.default_rng(0).normal(size=size)
    ours = turned(jnp.asarray(x, jnp.float32)[None, None, None], jnp.array([[at]]), steps(frequencies(size, 1e4)))
    np.testing.assert_allclose(ours[0, 0, 0], matrix @ x, atol=1e-5)


def test_angles_are_float32_under_bfloat16():
    """bfloat16 rounds 257 to 256: the two positions would then be one."""
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    found = turned(x, jnp.array([[256, 257]]), steps(frequencies(8, 1e4)))
    assert found.dtype == jnp.bfloat16
    assert jnp.abs(found[0, 0] - found[0, 1]).astype(jnp.float32).max() > 0.1
