"""What layers can be made of: every preset decodes, learns, and has no parameter that does nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.presets import BLOCKS
from rope_lm.block import MLPS, NORMS, RESIDUALS, Style, product
from rope_lm.positions import contiguous
from tests.models import LENGTH, model, section, tokens
from tests.test_training import BATCH, program, rows

every_block = pytest.mark.parametrize("name", sorted(BLOCKS))


def test_each_row_is_a_style_and_each_piece_is_in_some_row():
    styles = [Style(**row) for row in BLOCKS.values()]
    for key, table in (("norm", NORMS), ("mlp", MLPS), ("residual", RESIDUALS)):
        assert {getattr(style, key) for style in styles} == set(table)


@every_block
def test_cached_decoding_equals_the_full_forward_pass(name):
    made, text = model("rotary", block=BLOCKS[name]), tokens(2)
    full, _ = made(text)
    cache, pieces, at = made.cache(2, LENGTH), [], 0
    for size in (5, 1, 26):
        logits, cache = made(text[:, at : at + size], contiguous(size, at), cache)
        pieces.append(logits)
        at += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=2e-5)


@every_block
def test_every_parameter_is_trained_and_a_row_is_learned(name):
    predicted = {"name": "causal"}
    made = program("rotary", 1, model=section("rotary", block=BLOCKS[name]), predicted=predicted)
    start = made.init(np.array([0], np.uint32), np.array([1e-2], np.float32))
    before = jax.tree.map(np.asarray, start.params)
    row, state = np.repeat(rows(0, 0)[:1], BATCH, 0)[None], start
    for _ in range(80):
        state, metrics = made.step(state, row)
    assert float(metrics.nats[0]) < 0.2  # from ln 17 = 2.8
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(state.params), strict=True):
        assert not np.array_equal(old, new), path


@every_block
def test_the_weights_that_are_counted_are_those_that_are_there(name):
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: model("rotary", block=BLOCKS[name])), nnx.Param))
    there = sum(x.size for path, x in jax.tree.leaves_with_path(shapes["blocks"]) if path[-1].key == "weight")
    assert 2 * Style(**BLOCKS[name]).weights(width=32, hidden=64) == there, "in two layers"


def test_a_parallel_block_reads_the_stream_once():
    """Attention and MLP of one layer do not see each other: without attention's output the MLP adds the same."""
    made = model("none", layers=1, block=BLOCKS["neox"])
    stream = jax.random.normal(jax.random.key(0), (6, 32))
    graph, state = nnx.split(made.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    silent, _ = block(stream, 1, lambda q, k, v: (jnp.zeros_like(v), None))
    heard, _ = block(stream, 1, lambda q, k, v: (v, None))
    added, _ = block.attention(block.attention_norm(stream), 1, lambda q, k, v: (v, None))
    np.testing.assert_allclose(heard - silent, added - block.out.bias[...], atol=1e-5)


@pytest.mark.parametrize("inner, outer", [(12, 20), (16, 16), (20, 12)])
def test_a_product_is_a_product_values_and_gradients(inner, outer):
    keys, sizes = jax.random.split(jax.random.key(0), 3), [(8, inner), (inner, outer), (8, outer)]
    x, w, g = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))
    value, pull = jax.vjp(jax.jit(product), x, w)
    expected, plain = jax.vjp(jnp.matmul, x, w)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for found, wanted in zip(pull(g), plain(g), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("inner, outer, computed", [(12, 20, "12,20"), (20, 12, "12,20")])
def test_the_gradient_of_weights_is_computed_narrow_side_first(inner, outer, computed):
    """In the program that is compiled too: XLA would turn a product that is turned."""

    def of_weights(x, w, g):
        return jax.vjp(product, x, w)[1](g)[1]

    given = jnp.ones((8, inner)), jnp.ones((inner, outer)), jnp.ones((8, outer))
    products = [line for line in jax.jit(of_weights).lower(*given).compile().as_text().splitlines() if " dot(" in line]
    assert len(products) == 1 and f"f32[{computed}]" in products[0].split(" dot(")[0]
