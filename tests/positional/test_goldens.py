"""Every encoding compared with an implementation that this project did not write (tests/goldens/make.py)."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rope_lm import positional
from rope_lm.positional.pairing import order
from rope_lm.positions import View, contiguous
from rope_lm.refusal import Refusal

FOLDER = Path(__file__).parents[1] / "goldens"
GOLDENS = json.loads((FOLDER / "index.json").read_text())["goldens"]
SIZE = 16


def load(name: str) -> tuple[positional.PositionalEncoding, dict[str, np.ndarray]]:
    """Return the encoding with the golden's parameters, and the golden's other arrays."""
    golden = GOLDENS[name]
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    shape = positional.Shape(golden["heads"] * SIZE, golden["heads"], SIZE, layers=1, causal=golden["causal"])
    made = positional.make(golden["position"], shape=shape, rngs=nnx.Rngs(0, position=1))
    for path, parameter in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        assert parameter.shape == arrays[path[0]].shape, path
        getattr(made, path[0])[...] = jnp.asarray(arrays.pop(path[0]))
    return positional.at_layer(made, 0), arrays


def probabilities(
    made: positional.PositionalEncoding, arrays: dict[str, np.ndarray], pairing: str, causal: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Return the golden's [N T T] as the model computes them, in float32 and in bfloat16."""
    ours = order(pairing, SIZE, 8 if pairing == "first" else SIZE)
    graph, state = nnx.split(made)
    at = contiguous(arrays["q"].shape[1])
    view = View(at, at, causal)

    @jax.jit
    def both(state: nnx.State, q: jax.Array, k: jax.Array) -> list[jax.Array]:
        return [one(nnx.merge(graph, state), q.astype(dtype), k.astype(dtype)) for dtype in ("float32", "bfloat16")]

    def one(made: positional.PositionalEncoding, q: jax.Array, k: jax.Array) -> jax.Array:
        turned = made.rotate(q, k, view)
        logits = jnp.einsum("btnh,bsnh->bnts", *turned, preferred_element_type=jnp.float32) / math.sqrt(SIZE)
        for added in (made.bias(view), made.score(q, k, view)):
            logits = logits if added is None else logits + added
        return jax.nn.softmax(jnp.where(view.visible[:, None], logits, -jnp.inf))[0]

    return both(state, *(x[..., ours].swapaxes(0, 1)[None] for x in (arrays["q"], arrays["k"])))


@pytest.mark.parametrize(
    "name", [name for name in GOLDENS if GOLDENS[name]["position"]["name"] not in ("learned", "sinusoidal")]
)
def test_attention_is_that_of_another_implementation(name):
    made, arrays = load(name)
    causal = GOLDENS[name]["causal"]
    exact, rough = probabilities(made, arrays, GOLDENS[name]["pairing"], causal)
    np.testing.assert_allclose(exact, arrays["probabilities"], atol=1e-6)
    seen = np.tril(np.ones(arrays["probabilities"].shape[1:], bool), 0 if causal else SIZE)
    near, logits = (np.log(np.asarray(x)[:, seen] + 1e-30) for x in (rough, arrays["probabilities"]))
    likely = logits > math.log(1e-3)
    assert np.abs(near - logits)[likely].mean() < 2e-2, "in bfloat16"


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_embeddings_are_those_of_another_implementation(name):
    made, arrays = load(name)
    added = made.embed(jnp.zeros((1, *arrays["added"].shape)), contiguous(len(arrays["added"])))[0]
    np.testing.assert_allclose(added, arrays["added"], atol=1e-6)


def test_encodings_have_goldens():
    """Except `none`, which is nothing, and four that are compared with their parts or their definition.

    `rotary_layered` and `rotary_sinusoidal` are tested below, `forgetting` in test_forgetting, `rotary_features` in
    tests/attention.
    """
    have = {golden["position"]["name"] for golden in GOLDENS.values()}
    others = {"none", "rotary_layered", "rotary_sinusoidal", "rotary_features", "forgetting"}
    assert set(positional.ENCODINGS) - have == others


def test_rotary_with_sinusoids_is_both():
    rows = {"rotary_sinusoidal": {"base": 1e4, "scale": 0.5}}
    rows |= {"rotary": {"base": 1e4}, "sinusoidal": {"base": 1e4, "scale": 0.5}}
    both, rotary, sinusoidal = (build({"name": name, **row}) for name, row in rows.items())
    x, at = jax.random.normal(jax.random.key(0), (1, 12, 4, SIZE)), contiguous(12)
    view = View(at, at, True)
    for ours, theirs in zip(both.rotate(x, x, view), rotary.rotate(x, x, view), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    flat = x.reshape(1, 12, 64)
    np.testing.assert_array_equal(both.embed(flat, at), sinusoidal.embed(flat, at))


def build(row: dict) -> positional.PositionalEncoding:
    shape = positional.Shape(64, 4, SIZE, layers=4, causal=True)
    return positional.make(row, shape=shape, rngs=nnx.Rngs(0, position=1))


def test_each_layer_has_the_rotation_of_its_base():
    layered = build({"name": "rotary_layered", "bases": (1e4, 0.0, 5e5)})
    x, at = jax.random.normal(jax.random.key(0), (1, 12, 4, SIZE)), contiguous(12)
    view = View(at, at, True)
    for layer, base in enumerate((1e4, 0.0, 5e5, 1e4)):
        alone = build({"name": "rotary", "base": base} if base else {"name": "none"})
        found, expected = (made.rotate(x, x, view) for made in (positional.at_layer(layered, layer), alone))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_wrong_pairing_or_parameter_is_seen():
    made, arrays = load("rotary_interleaved")
    wrong, _ = probabilities(made, arrays, "half-split")
    assert np.abs(wrong - arrays["probabilities"]).max() > 0.01
    made, arrays = load("yarn_2048")
    made.amplitude **= 2  # scaled twice
    wrong, _ = probabilities(made, arrays, "half-split")
    assert np.abs(wrong - arrays["probabilities"]).max() > 0.001


@pytest.mark.parametrize("pairing", ["half-split", "interleaved", "first"])
def test_a_pairing_is_an_order_that_can_be_inverted(pairing):
    theirs = np.arange(100, 116)
    there = order(pairing, 16, 8 if pairing == "first" else 16)
    assert sorted(there) == list(range(16))
    np.testing.assert_array_equal(theirs[there][np.argsort(there)], theirs)
    pair = {"half-split": (1, 9), "interleaved": (2, 3), "first": (1, 5)}[pairing]
    assert tuple(there[[1, 9]]) == pair


def test_an_unknown_pairing_or_an_odd_size_is_refused():
    for arguments, words in [(("halves", 8, 8), "must be one of half-split, "), (("first", 8, 3), "both must be even")]:
        with pytest.raises(Refusal, match=words):
            order(*arguments)
