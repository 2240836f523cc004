"""The model beside its encoding: shapes, sizes, what it keeps for the backward pass, what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.presets import BLOCKS
from rope_lm import positional
from rope_lm.attention.base import WHOLE
from rope_lm.positional.content import PIECE
from rope_lm.positions import contiguous
from rope_lm.refusal import Refusal
from rope_lm.transformer import flops_per_token
from tests.models import LENGTH, VOCABULARY, model, position, tokens


def loss(made, text):
    return jnp.mean(jax.nn.logsumexp(made(text)[0], -1) - made(text)[0][..., 0])


def test_what_is_kept_changes_no_gradient():
    text, found = tokens(2), {}
    for remat in ("none", "products", "full"):
        found[remat] = nnx.jit(nnx.grad(loss))(model("relative_bias", remat=remat), text)
    for remat in ("products", "full"):
        for got, wanted in zip(jax.tree.leaves(found[remat]), jax.tree.leaves(found["none"]), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_bfloat16_computes_near_float32_and_answers_in_float32():
    text = tokens(2)
    exact, rough = model("rotary")(text)[0], model("rotary", dtype="bfloat16")(text)[0]
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.15)
    parameters = nnx.state(model("rotary", dtype="bfloat16"), nnx.Param)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parameters))


def test_a_token_that_is_everywhere_has_its_gradient_under_bfloat16_too():
    """The sum over its places is one of float32 numbers: of bfloat16 numbers it was off by 80% here."""
    text = jnp.where(jax.random.uniform(jax.random.key(2), (128, LENGTH)) < 0.9, 0, tokens(128))

    def gradient(dtype: str) -> jax.Array:
        return nnx.jit(nnx.grad(loss))(model("rotary", dtype=dtype), text).embedding[...]

    exact = gradient("float32")
    assert jnp.linalg.norm(gradient("bfloat16") - exact) < 0.02 * jnp.linalg.norm(exact)


def test_tied_output_has_logits_of_unit_scale_and_no_head():
    made = model("none", tied=True)
    assert made.head is None
    assert 0.5 < float(made(tokens(4))[0].std()) < 2
    assert made(tokens(4))[0].shape == (4, 32, VOCABULARY)


def test_compiling_does_not_grow_with_depth():
    """One layer is traced whatever the depth: the program for 16 layers is as long as that for 2."""

    def size(layers: int) -> int:
        graph, params = nnx.split(nnx.eval_shape(lambda: model("rotary", layers=layers)))
        lowered = jax.jit(jax.grad(lambda p, t: loss(nnx.merge(graph, p), t))).lower(params, tokens(2))
        return len(lowered.as_text())

    assert size(16) < 1.02 * size(2)


def test_flops_are_those_of_the_formula_written_out():
    """One layer, width 2, hidden 3, vocabulary 5, length 3: counted by hand."""
    qkv, out, mlp, head = 2 * 2 * 6, 2 * 2 * 2, 2 * 2 * 3 * 2, 2 * 2 * 5
    attention = 2 * 2 * 2 * (1 + 2 + 3) / 3  # two products, two operations each, over 1, 2 and 3 keys of width 2
    softmax = {"name": "softmax", "kernel": "xla"}
    none = {"position": {"name": "none"}, "block": BLOCKS["ours"]}
    sizes = {"width": 2, "heads": 1, "layers": 1, "hidden": 3, "vocabulary": 5, "length": 3} | none
    count = flops_per_token(**sizes, attention=softmax, causal=True)
    assert count == 3 * (qkv + out + mlp + head + attention)
    assert (
        flops_per_token(**sizes, attention=softmax, causal=False) == count + 3 * 2 * 2 * 2
    )  # three keys each, not two
    linear = {"name": "performer", "features": 4, "redraw": 1, "block": 2}
    # Features of q and k, sums of k v, their product with q; and in a block (1 + 2) / 2 keys of features and of values.
    attention = 2 * (2 * 2 * 4 + 2 * 2 * 4 + (4 + 2) * (1 + 2) / 2)
    assert flops_per_token(**sizes, attention=linear, causal=True) == 3 * (qkv + out + mlp + head + attention)
    gated = flops_per_token(**sizes | {"block": BLOCKS["llama"]}, attention=softmax, causal=True)
    assert gated == count + 3 * mlp / 2  # a third matrix
    transformed = flops_per_token(**sizes | {"block": BLOCKS["bert"]}, attention=softmax, causal=True)
    assert transformed == count + 3 * 2 * 2 * 2


@pytest.mark.parametrize("name", sorted(positional.ENCODINGS))
def test_flops_of_an_encoding_are_its_products_written_out(name):
    """In two layers, width 16, 2 heads, length 5, for a token: over the 3 keys that it sees on average."""
    row = position(name, 5) | {"shaw": {"max_distance": 3}, "cope": {"positions": 6}}.get(name, {})
    products = {
        "shaw": 16 * 4,  # queries with 4 vectors
        "transformer_xl": 16 * 3,  # queries with the key of each distance
        "cope": 16 * 3 + 16 * 6,  # gates of every key, then queries with 6 vectors
    }
    sizes = {"width": 16, "heads": 2, "layers": 2, "hidden": 3, "vocabulary": 5, "length": 5, "block": BLOCKS["ours"]}
    softmax = {"name": "softmax", "kernel": "xla"}
    found, plain = (
        flops_per_token(**sizes, position=each, attention=softmax, causal=True) for each in (row, {"name": "none"})
    )
    assert found == plain + 3 * 2 * 2 * products.get(name, 0)


@pytest.mark.parametrize("name", ["shaw", "transformer_xl", "cope"])
def test_flops_of_an_encoding_are_near_what_xla_counts(name):
    """Beside the products XLA counts sines, sums, and what is once for all rows, which fade as width and batch grow;
    and the distances between all queries and all keys are twice as many as the keys."""
    shape = positional.Shape(width=512, heads=4, head_size=128, layers=1, causal=name == "cope")
    made = positional.make(position(name, 64), shape=shape, rngs=nnx.Rngs(0))
    where, x = contiguous(64), jax.ShapeDtypeStruct((64, 64, 4, 128), jnp.float32)
    one = lambda q, k: made.score(q, k, where, where, made.prepare(where, where)[0], [WHOLE])  # noqa: E731
    lowered = jax.jit(one).lower(x, x)
    sums = 4 * 64 * PIECE if name == "cope" else 0  # over keys, which are products too, and not counted
    counted = 2 * 64 * 64 * (made.flops(shape, 64) + sums) * (2 if name == "transformer_xl" else 1)
    assert counted < lowered.compile().cost_analysis()["flops"] < 1.5 * counted


@pytest.mark.parametrize(
    "change, words",
    [
        ({"block": BLOCKS["ours"] | {"norm": "batch"}}, "unknown model.block.norm 'batch'"),
        ({"block": BLOCKS["ours"] | {"mlp": "swigl"}}, "unknown model.block.mlp 'swigl': did you mean swiglu"),
        ({"block": BLOCKS["ours"] | {"residual": "none"}}, "unknown model.block.residual 'none'"),
        ({"block": BLOCKS["ours"] | {"epsilon": 0.0}}, "model.block.epsilon=0.0: must be above 0"),
        ({"block": BLOCKS["ours"] | {"bias": True}}, "unknown key in model.block 'bias': did you mean biases"),
        ({"block": {"norm": "rms"}}, "model.block lacks epsilon, mlp, biases, residual, transform"),
        ({"heads": 5}, "model.width=32 is not divisible by model.heads=5"),
        ({"layers": 0}, "model.layers=0: must be at least 1"),
        ({"dtype": "float16"}, "model.dtype='float16': must be float32 or bfloat16"),
        ({"remat": "some"}, "unknown model.remat 'some'"),
        ({"embedding_scale": 0.0}, "model.embedding_scale=0.0: must be above 0"),
    ],
)
def test_sizes_that_make_no_model_are_refused(change, words):
    with pytest.raises(Refusal, match=words):
        model("none", **change)
