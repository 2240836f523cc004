"""Every encoding against an implementation that this project did not write (tests/goldens/make.py)."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rope_lm import positional
from rope_lm.attention.base import WHOLE
from rope_lm.positional.pairing import order
from rope_lm.positions import contiguous, visible
from rope_lm.refusal import Refusal

FOLDER = Path(__file__).parents[1] / "goldens"
GOLDENS = json.loads((FOLDER / "index.json").read_text())["goldens"]
SIZE = 16


def load(name: str) -> tuple[positional.PositionalEncoding, dict[str, np.ndarray]]:
    """The encoding with the golden's parameters, and the golden's other arrays."""
    golden = GOLDENS[name]
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    shape = positional.Shape(golden["heads"] * SIZE, golden["heads"], SIZE, layers=1, causal=golden["causal"])
    made = positional.make(golden["position"], shape=shape, rngs=nnx.Rngs(0, position=1))
    for path, parameter in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        assert parameter.shape == arrays[path[0]].shape, path
        getattr(made, path[0])[...] = jnp.asarray(arrays.pop(path[0]))
    return made, arrays


def probabilities(
    made: positional.PositionalEncoding, q, k, pairing: str, turned: int, dtype, causal: bool = True
) -> jax.Array:
    """[N T T], as the model computes them, of q and k [N T H] in another pairing."""
    ours = order(pairing, SIZE, turned)
    q, k = (jnp.asarray(x[..., ours].swapaxes(0, 1)[None], dtype) for x in (q, k))
    at, layer = contiguous(q.shape[1]), jnp.int32(0)
    turned_q, turned_k = made.rotate(q, k, at, at, layer)
    logits = jnp.einsum("btnh,bsnh->bnts", turned_q, turned_k, preferred_element_type=jnp.float32) / math.sqrt(SIZE)
    of_layer = jax.tree.map(lambda each: each[0], made.prepare(at, at))
    bias, score = made.bias(at, at), made.score(q, k, at, at, of_layer, [WHOLE])
    for added in (bias, *(score or [])):
        logits = logits if added is None else logits + added
    return jax.nn.softmax(jnp.where(visible(at, at, causal), logits, -jnp.inf))[0]


@pytest.mark.parametrize(
    "name", [name for name in GOLDENS if GOLDENS[name]["position"]["name"] not in ("learned", "sinusoidal")]
)
def test_attention_is_that_of_another_implementation(name):
    made, arrays = load(name)
    pairing, causal = GOLDENS[name]["pairing"], GOLDENS[name]["causal"]
    turned = 8 if pairing == "first" else SIZE
    call = lambda dtype: probabilities(made, arrays["q"], arrays["k"], pairing, turned, dtype, causal)  # noqa: E731
    np.testing.assert_allclose(call(jnp.float32), arrays["probabilities"], atol=1e-6)
    seen = np.tril(np.ones(arrays["probabilities"].shape[1:], bool), 0 if causal else SIZE)
    near, logits = (np.log(np.asarray(x)[:, seen] + 1e-30) for x in (call(jnp.bfloat16), arrays["probabilities"]))
    likely = logits > math.log(1e-3)
    assert np.abs(near - logits)[likely].mean() < 2e-2, "in bfloat16"


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_embeddings_are_those_of_another_implementation(name):
    made, arrays = load(name)
    added = made.embed(jnp.zeros((1, *arrays["added"].shape)), contiguous(len(arrays["added"])))[0]
    np.testing.assert_allclose(added, arrays["added"], atol=1e-6)


def test_encodings_have_goldens():
    """But `none`, which is nothing; `rotary_layered`, which is rotary at each of its bases (tested below), and
    `rotary_sinusoidal`, which is both; `rotary_features` is held against Eq. 19 in tests/attention."""
    has = {golden["position"]["name"] for golden in GOLDENS.values()}
    assert set(positional.ENCODINGS) - has == {"none", "rotary_layered", "rotary_sinusoidal", "rotary_features"}


def test_rotary_with_sinusoids_is_both():
    made, parts = (
        [
            positional.make(
                {"name": name, "base": 1e4} | ({"scale": 0.5} if "sin" in name else {}),
                shape=positional.Shape(64, 4, SIZE, layers=1, causal=True),
                rngs=nnx.Rngs(0, position=1),
            )
            for name in names
        ]
        for names in (["rotary_sinusoidal"], ["rotary", "sinusoidal"])
    )
    x, at, layer = jax.random.normal(jax.random.key(0), (1, 12, 4, SIZE)), contiguous(12), jnp.int32(0)
    for ours, theirs in zip(made[0].rotate(x, x, at, at, layer), parts[0].rotate(x, x, at, at, layer), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    flat = x.reshape(1, 12, 64)
    np.testing.assert_array_equal(made[0].embed(flat, at), parts[1].embed(flat, at))


def test_each_layer_has_the_rotation_of_its_base():
    shape = positional.Shape(64, 4, SIZE, layers=4, causal=True)
    build = lambda row: positional.make(row, shape=shape, rngs=nnx.Rngs(0, position=1))  # noqa: E731
    layered = build({"name": "rotary_layered", "bases": (1e4, 0.0, 5e5)})
    x, at = jax.random.normal(jax.random.key(0), (1, 12, 4, SIZE)), contiguous(12)
    for layer, base in enumerate((1e4, 0, 5e5, 1e4)):
        alone = build({"name": "rotary", "base": float(base)} if base else {"name": "none"})
        for ours, theirs in zip(
            *(each.rotate(x, x, at, at, jnp.int32(layer)) for each in (layered, alone)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_wrong_pairing_or_parameter_is_seen():
    made, arrays = load("rotary_interleaved")
    wrong = probabilities(made, arrays["q"], arrays["k"], "half-split", SIZE, jnp.float32)
    assert np.abs(wrong - arrays["probabilities"]).max() > 0.01
    made, arrays = load("yarn_2048")
    made.amplitude **= 2  # scaled twice
    wrong = probabilities(made, arrays["q"], arrays["k"], "half-split", SIZE, jnp.float32)
    assert np.abs(wrong - arrays["probabilities"]).max() > 0.001


@pytest.mark.parametrize("pairing", ["half-split", "interleaved", "first"])
def test_a_pairing_is_an_order_and_has_a_way_back(pairing):
    theirs = np.arange(100, 116)
    there = order(pairing, 16, 8 if pairing == "first" else 16)
    assert sorted(there) == list(range(16))
    np.testing.assert_array_equal(theirs[there][np.argsort(there)], theirs)
    pair = {"half-split": (1, 9), "interleaved": (2, 3), "first": (1, 5)}[pairing]
    assert tuple(there[[1, 9]]) == pair


def test_a_pairing_that_is_none_is_one_line():
    for arguments, words in [(("halves", 8, 8), "must be one of half-split, "), (("first", 8, 3), "both must be even")]:
        with pytest.raises(Refusal, match=words):
            order(*arguments)
