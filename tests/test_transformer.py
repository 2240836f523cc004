"""The model apart from its encoding: sizes, dtypes, remat, attention weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.presets import BLOCKS
from rope_lm.refusal import Refusal
from rope_lm.transformer import REMAT, Transformer
from tests.models import LENGTH, PERFORMER, VOCABULARY, forward, model, tokens


def loss(made: Transformer, text: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.logsumexp(made(text)[0], -1) - made(text)[0][..., 0])


@pytest.mark.parametrize("chosen", ["products", pytest.param("full", marks=pytest.mark.all)])
def test_remat_changes_no_gradient(chosen):
    assert set(REMAT) == {"none", "products", "full"}
    text, found = tokens(2), {}
    for remat in ("none", chosen):
        graph, state = nnx.split(model("relative_bias", remat=remat))
        found[remat] = jax.jit(jax.grad(lambda state, graph=graph: loss(nnx.merge(graph, state), text)))(state)
    for got, wanted in zip(jax.tree.leaves(found[chosen]), jax.tree.leaves(found["none"]), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_bfloat16_computes_near_float32_and_answers_in_float32():
    text = tokens(2)
    exact, rough = (forward(model("rotary", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rough.whole(text).dtype == jnp.float32
    np.testing.assert_allclose(rough.whole(text), exact.whole(text), atol=0.15)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rough.state))


def test_the_gradient_of_a_token_that_is_everywhere_is_summed_in_float32():
    """Under bfloat16 too, where a sum of bfloat16 numbers would be far off."""
    text = jnp.where(jax.random.uniform(jax.random.key(2), (64, LENGTH)) < 0.9, 0, tokens(64))

    def gradient(dtype: str) -> jax.Array:
        graph, state = nnx.split(model("none", layers=1, dtype=dtype))
        gradients = jax.jit(jax.grad(lambda state: loss(nnx.merge(graph, state), text)))(state)
        return gradients["embedding"][...]

    exact = gradient("float32")
    assert jnp.linalg.norm(gradient("bfloat16") - exact) < 0.02 * jnp.linalg.norm(exact)


def test_tied_output_has_logits_of_unit_scale_and_no_head():
    made = model("none", tied=True)
    logits = forward(made).whole(tokens(4))
    assert made.head is None and logits.shape == (4, LENGTH, VOCABULARY)
    assert 0.5 < float(logits.std()) < 2


def test_compiling_does_not_grow_with_depth():
    """One layer is traced whatever the depth: the program for 16 layers is as long as that for 2."""

    def size(layers: int) -> int:
        graph, params = nnx.split(nnx.eval_shape(lambda: model("rotary", layers=layers)))
        lowered = jax.jit(jax.grad(lambda p, t: loss(nnx.merge(graph, p), t))).lower(params, tokens(2))
        return len(lowered.as_text())

    assert size(16) < 1.02 * size(2)


@pytest.mark.parametrize(
    "name, performer",
    [
        *((name, False) for name in ("fire", "transformer_xl", "cope")),
        ("rotary_features", True),
        *(pytest.param("rotary", performer, marks=pytest.mark.all) for performer in (False, True)),
    ],
)
def test_attention_weights_reproduce_the_forward_pass(name, performer):
    """Weights times values give the model's residual stream, in every layer."""
    text = tokens(2)
    built = model(name, **({"attention": PERFORMER} if performer else {}))
    made, graph = forward(built), nnx.graphdef(built)

    @jax.jit
    def run(state: nnx.State) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        made = nnx.merge(graph, state)
        stream, _, weights = made._layers(text, None, None, None, weights=True)
        return stream, made._layers(text, None, None, None)[0], weights, made.weights(text)

    stream, plain, weights, public = run(made.state)
    assert weights.shape == (2, 2, 4, LENGTH, LENGTH)
    np.testing.assert_allclose(stream, plain, atol=5e-5)
    np.testing.assert_array_equal(weights, public)
    assert np.abs(np.triu(np.asarray(weights), 1)).max() == 0, "no query sees a key after it"
    if name != "rotary_features":  # whose denominator is not turned, so that its weights are no shares
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.abs(weights - weights[..., ::-1, :]).max() > 0.1


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
        ({"head_size": 0}, "model.head_size=0: must be at least 1"),
        ({"dtype": "float16"}, "model.dtype='float16': must be float32 or bfloat16"),
        ({"remat": "some"}, "unknown model.remat 'some'"),
        ({"embedding_scale": 0.0}, "model.embedding_scale=0.0: must be above 0"),
    ],
)
def test_a_section_that_makes_no_model_is_refused(change, words):
    with pytest.raises(Refusal, match=words):
        model("none", **change)
