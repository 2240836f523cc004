"""T5's buckets, compared with values written down from the definition."""

import jax.numpy as jnp
import numpy as np

from rope_lm.positional.bias import bucket
from rope_lm.positions import View, contiguous
from tests.models import encoding, position


def test_buckets_are_exact_then_logarithmic_then_one():
    """arXiv 1910.10683, section 2.1, with 32 buckets to 128: values of the definition, computed in float64 by hand."""
    distance = np.array([-3, 0, 1, 15, 16, 18, 19, 31, 32, 63, 64, 127, 128, 10_000])
    expected = [0, 0, 1, 15]
    for d in distance[4:]:
        expected.append(min(31, 16 + int(np.log(d / 16) / np.log(128 / 16) * 16 + 1e-9)))
    np.testing.assert_array_equal(bucket(jnp.asarray(distance), 32, 128, causal=True), expected)


def test_the_bias_is_the_table_row_of_the_bucket():
    made, at = encoding(position("relative_bias")), contiguous(32)
    bias = made.bias(View(at, at, causal=True))
    assert bias.shape == (1, 4, 32, 32)
    for q, k in [(0, 0), (5, 2), (31, 0), (20, 19)]:
        row = int(bucket(jnp.array(q - k), 32, 128, causal=True))
        np.testing.assert_allclose(bias[0, :, q, k], made.table[...][row], rtol=1e-6)


def test_bidirectional_buckets_are_half_for_each_side():
    """T5's released code by hand, 32 buckets to 128 tokens: 8 exact ones a side, then 8 + floor(8 log16(d / 8))."""
    back = {0: 0, 1: 1, 7: 7, 8: 8, 17: 10, 33: 12, 65: 14, 127: 15, 1000: 15}
    for distance, expected in back.items():
        assert int(bucket(jnp.array(distance), 32, 128, causal=False)) == expected
        if distance:
            assert int(bucket(jnp.array(-distance), 32, 128, causal=False)) == 16 + expected
