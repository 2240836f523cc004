"""Layers of every style: each preset decodes, learns, and has no parameter that does nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.presets import BLOCKS
from rope_lm.block import MLPS, NORMS, RESIDUALS, Style
from tests.models import forward, model, tokens
from tests.programs import BATCH, program, rows, start

# gpt2's pieces are among those of ours and bert; ours is trained by most other tests.
ALL = {"gpt2", "ours"}
every_block = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.all if name in ALL else ()) for name in sorted(BLOCKS)]
)


def test_each_row_is_a_style_and_each_piece_is_in_some_row():
    styles = [Style(**row) for row in BLOCKS.values()]
    for key, table in (("norm", NORMS), ("mlp", MLPS), ("residual", RESIDUALS)):
        assert {getattr(style, key) for style in styles} == set(table)


@every_block
def test_cached_decoding_equals_the_full_forward_pass(name):
    made, text = forward(model("rotary", block=BLOCKS[name])), tokens(2)
    np.testing.assert_allclose(made.decoded(text, 8), made.whole(text), atol=2e-5)


@every_block
def test_every_parameter_is_trained_and_a_row_is_learned(name):
    made = program("rotary", model={"block": BLOCKS[name]})
    state = start(made, (0,))
    before = jax.tree.map(np.array, state.params)
    row = np.repeat(rows(0, 0)[:1], BATCH, 0)[None]
    for _ in range(80):
        state, metrics = made.step(state, row)
    assert float(metrics.nats[0]) < 0.2  # from ln 17 = 2.8
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(state.params), strict=True):
        assert not np.array_equal(old, new), path


def test_attention_and_mlp_of_a_parallel_block_do_not_see_each_other():
    """Without attention's output the MLP adds the same."""
    made = model("none", layers=1, block=BLOCKS["neox"])
    stream = jax.random.normal(jax.random.key(0), (6, 32))
    graph, state = nnx.split(made.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))

    def silence(x: jax.Array) -> tuple[jax.Array, None]:
        return jnp.zeros_like(x), None

    def echo(x: jax.Array) -> tuple[jax.Array, None]:
        return x, None

    silent, heard = block(stream, silence)[0], block(stream, echo)[0]
    added, _ = block.attention(block.attention_norm(stream), echo)
    np.testing.assert_allclose(heard - silent, added - block.out.bias[...], atol=1e-5)


def test_queries_keys_and_values_of_a_head_are_those_of_its_columns():
    made = model("none", layers=1, head_size=6)
    graph, state = nnx.split(made.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    x = jax.random.normal(jax.random.key(0), (10, 32))
    columns = (np.asarray(x) @ np.asarray(block.qkv.weight[...])).reshape(2, 5, 4, 3, 6)
    for found, expected in zip(block.queries_keys_values(x, 2), np.moveaxis(columns, 3, 0), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
