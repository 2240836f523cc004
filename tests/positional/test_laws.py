"""The laws that hold for all encodings, and the properties that each one claims.

The default tests cover one encoding of each mechanism. The others differ from one of those in a frequency vector or a
curve, which their goldens cover.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.presets import FOR_FEATURES, POSITIONS
from rope_lm import positional
from rope_lm.kernels.softmax import WHOLE, blocks
from rope_lm.positional import PositionalEncoding, Shape
from rope_lm.positions import Positions, View, contiguous
from rope_lm.refusal import Refusal
from tests.models import compiled, encoding, forward, model, position, redrawn, tokens

LENGTH = 80  # two blocks of queries, one of them short
SHAPE = Shape(32, 4, 8, 2, causal=True)


class Claims(NamedTuple):
    """The properties that an encoding claims."""

    shift_invariant: bool = True
    sees_order: bool = True
    limited: bool = False
    bias: bool = False  # adds to the logits by position alone
    score: bool = False  # adds to the logits by content too
    mechanism: bool = False  # True if the default tests cover it


# A new encoding adds its row here.
CLAIMS = {
    "none": Claims(sees_order=False, mechanism=True),
    "learned": Claims(shift_invariant=False, limited=True, mechanism=True),
    "sinusoidal": Claims(shift_invariant=False, mechanism=True),
    "relative_bias": Claims(bias=True, mechanism=True),
    "alibi": Claims(bias=True),
    "kerple_log": Claims(bias=True),
    "kerple_power": Claims(bias=True, mechanism=True),
    "fire": Claims(bias=True, shift_invariant=False, mechanism=True),
    "continuous_bias": Claims(bias=True),
    "sandwich": Claims(bias=True),
    "rotary": Claims(mechanism=True),
    "rotary_partial": Claims(),
    "rotary_layered": Claims(mechanism=True),
    "rotary_linear": Claims(),
    "rotary_ntk": Claims(),
    "rotary_dynamic": Claims(shift_invariant=False, mechanism=True),
    "yarn": Claims(),
    "llama3": Claims(),
    "rotary_features": Claims(mechanism=True),
    "rotary_sinusoidal": Claims(shift_invariant=False),
    "xpos": Claims(mechanism=True),
    "p_rope": Claims(),
    "shaw": Claims(score=True, mechanism=True),
    "transformer_xl": Claims(score=True, mechanism=True),
    "cope": Claims(score=True, mechanism=True),
    "forgetting": Claims(score=True, mechanism=True),
}
ADDS = sorted(name for name, claims in CLAIMS.items() if claims.bias or claims.score)
BOTH_WAYS = [name for name in CLAIMS if not positional.ENCODINGS[name].looks_back]


def mark(name: str) -> tuple | pytest.MarkDecorator:
    """Leave an encoding to --all unless it stands for a mechanism."""
    return () if CLAIMS[name].mechanism else pytest.mark.all


def each(names: list[str]) -> pytest.MarkDecorator:
    """Run a test for these encodings."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark(name)) for name in names])


def remembering(made: PositionalEncoding, x: jax.Array, view: View) -> View:
    """Return the view of a layer whose input is x, with what an encoding remembers of it."""
    tokens = replace(view.q, memory=made.remember(x, view.q))
    return View(tokens, tokens, view.causal)


every_encoding = each(sorted(CLAIMS))
both_ways = each(BOTH_WAYS)


def test_the_tables_of_configs_library_and_claims_have_the_same_keys():
    assert set(POSITIONS) == set(positional.ENCODINGS) == set(CLAIMS)


def test_effects_are_found_in_the_hooks():
    found = {name: positional.effects(position(name), SHAPE) for name in CLAIMS}
    for name, claims in CLAIMS.items():
        assert (found[name].bias, found[name].score) == (claims.bias, claims.score), name
    assert tuple(name for name, effects in found.items() if effects.features) == FOR_FEATURES
    assert {name for name, effects in found.items() if effects.relative_norms} == {"xpos"}
    assert {effects.head_size for effects in found.values()} == {8}


@every_encoding
@pytest.mark.parametrize("chunk", [16, pytest.param(1, marks=pytest.mark.all)])
def test_cached_decoding_equals_the_full_forward_pass(name, chunk):
    made, text = compiled(name, LENGTH), tokens(2, LENGTH)
    np.testing.assert_allclose(made.decoded(text, chunk), made.whole(text), atol=2e-5)


def check_packing(made, length: int = LENGTH) -> None:
    """Check one row of two documents and padding, each document alone, and the second one after padding."""
    text, first, second = tokens(1, length), length // 8, length // 2
    apart = text[:, first : first + second]
    text = jnp.concatenate([text, text, jnp.roll(text, -first, 1), jnp.roll(text, length - first - second, 1)])
    np.testing.assert_array_equal(text[2:3, :second], apart)
    np.testing.assert_array_equal(text[3:, -second:], apart)
    rest = length - first - second
    rows = [[1] * first + [2] * second + [0] * rest, [1] * first + [0] * (length - first)]
    rows += [[1] * second + [0] * (length - second), [0] * (length - second) + [1] * second]
    logits = made.documents(text, rows)
    np.testing.assert_allclose(logits[0, :first], logits[1, :first], atol=2e-5)
    np.testing.assert_allclose(logits[0, first : first + second], logits[2, :second], atol=2e-5)
    np.testing.assert_allclose(logits[3, -second:], logits[2, :second], atol=2e-5)


@every_encoding
def test_packed_and_padded_documents_equal_the_same_documents_apart(name):
    check_packing(compiled(name, LENGTH))


@both_ways
def test_packed_documents_equal_the_same_documents_apart_in_a_bidirectional_model(name):
    check_packing(compiled(name, LENGTH, causal=False))


@every_encoding
def test_rows_known_to_be_contiguous_equal_rows_of_any_positions(name):
    """Their masks, their distances and their blocks of queries are known while tracing."""
    made, text = compiled(name, LENGTH), tokens(4, LENGTH)
    np.testing.assert_allclose(made.whole(text), made.shifted(text), atol=2e-5)


@both_ways
def test_rows_known_to_be_contiguous_equal_rows_of_any_positions_in_a_bidirectional_model(name):
    made, text = compiled(name, LENGTH, causal=False), tokens(4, LENGTH)
    known = made.whole(text)
    np.testing.assert_allclose(known, made.shifted(text), atol=2e-5)
    changed = text.at[:, -1].add(1) % 17
    assert jnp.abs(known - made.whole(changed))[:, 0].max() > 1e-6, "the first token sees the last"


@pytest.mark.parametrize(
    "name, causal",
    [
        pytest.param(name, causal, marks=mark(name))
        for name in ADDS
        for causal in (True, False)
        if causal or name in BOTH_WAYS
    ],
)
def test_parts_of_contiguous_rows_have_the_gradients_of_pairs(name, causal):
    """Values and gradients of what an encoding adds to the logits of every block of queries."""
    made = positional.make(position(name, LENGTH), shape=SHAPE._replace(causal=causal), rngs=nnx.Rngs(0, position=1))
    graph, state = nnx.split(made)
    if jax.tree.leaves(state):
        state = redrawn(nnx.State({"position": state}))["position"]
    q, k = jax.random.normal(jax.random.key(0), (2, 2, LENGTH, 4, 8))
    weights = jax.random.normal(jax.random.key(1), (2, 4, LENGTH, LENGTH))
    x = jax.random.normal(jax.random.key(2), (2, LENGTH, SHAPE.width))

    def total(state: nnx.State, q: jax.Array, k: jax.Array, view: View, parts: list) -> jax.Array:
        made, found = positional.at_layer(nnx.merge(graph, state), 1), 0.0
        view = remembering(made, x, view)
        for queries, keys in parts:
            part = view[queries, keys]
            bias, score = made.bias(part), made.score(q[:, queries], k[:, keys], part)
            added = bias if score is None else score
            found += jnp.sum(jnp.where(part.visible[:, None], added, 0) * weights[:, :, queries, keys])
        return found

    def gradients(view: View, parts: list) -> list:
        run = jax.jit(partial(jax.value_and_grad(total, argnums=(0, 1, 2)), view=view, parts=parts))
        return jax.tree.leaves(run(state, q, k))

    known, unknown = contiguous(LENGTH), Positions(jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32))
    whole = gradients(View(unknown, unknown, causal), [WHOLE])
    for ours, pairs in zip(gradients(View(known, known, causal), blocks(LENGTH, causal)), whole, strict=True):
        np.testing.assert_allclose(ours, pairs, rtol=1e-5, atol=2e-5 * max(1, jnp.abs(pairs).max()))


@every_encoding
def test_a_later_token_changes_nothing_before_it(name):
    made, text = compiled(name, LENGTH), tokens(4, LENGTH)
    changed = text.at[:, 70].add(1) % 17
    for run in (made.shifted, made.whole):
        before, after = run(text), run(changed)
        np.testing.assert_array_equal(before[:, :70], after[:, :70])
        assert jnp.abs(before - after)[:, 70:].max() > 1e-3


@every_encoding
def test_shifting_all_positions_changes_nothing_where_that_is_claimed(name):
    made, text = compiled(name, LENGTH), tokens(4, LENGTH)
    difference = jnp.abs(made.shifted(text) - made.shifted(text, 5 if name == "sinusoidal" else 1000)).max()
    if CLAIMS[name].shift_invariant:
        assert difference < 2e-3  # float32 angles at index 1000 are exact to 1e-4 radians
    else:
        assert difference > 1e-2


@both_ways
def test_a_shift_changes_nothing_in_a_bidirectional_model_where_that_is_claimed(name):
    made, text = compiled(name, LENGTH, causal=False), tokens(4, LENGTH)
    difference = jnp.abs(made.shifted(text) - made.shifted(text, 500)).max()
    assert difference < 2e-4 if CLAIMS[name].shift_invariant else difference > 1e-3


@every_encoding
def test_order_is_seen_where_that_is_claimed(name):
    """The last token's logits, when two earlier tokens of a model of one layer change places."""
    made = compiled(name, LENGTH)

    def silenced(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        second = path[:2] in (("blocks", "out"), ("blocks", "down"))
        return variable.replace(variable[...].at[1].set(0)) if second else variable

    made = made._replace(state=nnx.map_state(silenced, made.state))
    text = tokens(4, LENGTH).at[:, 75].set(1).at[:, 77].set(2)
    swapped = text.at[:, 75].set(2).at[:, 77].set(1)
    difference = jnp.abs(made.shifted(text) - made.shifted(swapped))[:, -1].max()
    assert (difference > 1e-3) == CLAIMS[name].sees_order


@every_encoding
def test_any_index_below_the_limit_is_finite_and_one_past_it_is_never_clamped(name):
    made, text = compiled(name, LENGTH), tokens(4, LENGTH)
    if not CLAIMS[name].limited:
        assert bool(jnp.isfinite(made.shifted(text, 1_000_000)).all())
        return
    assert bool(jnp.isfinite(made.shifted(text, 1000)).all())
    assert bool(jnp.isnan(made.shifted(text, 1001)[:, -1]).all())
    row = encoding(position(name, LENGTH))
    positional.check_length(row, LENGTH)
    with pytest.raises(Refusal, match=f"below {LENGTH}, the rows have {LENGTH + 1} tokens: set model.position.limit"):
        positional.check_length(row, LENGTH + 1)


@every_encoding
def test_whatever_an_encoding_adds_is_float32_under_bfloat16(name):
    """bfloat16 rounds 257 to 256, and 1.01 to 1: at far indices an encoding is as exact as in float32."""
    made, at = encoding(position(name, 1024)), contiguous(24, 1000)
    x = jax.random.normal(jax.random.key(0), (2, 24, 4, 8)).astype(jnp.bfloat16)
    view = remembering(made, x.reshape(2, 24, 32), View(at, at, causal=True))
    for added in jax.eval_shape(lambda: (made.bias(view), made.score(x, x, view))):
        assert added is None or added.dtype == jnp.float32
    narrow, exact = jax.jit(lambda x: [made.rotate(y, y, view) for y in (x, x.astype(jnp.float32))])(x)
    for ours, theirs in zip(narrow, exact, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2**-8, atol=2**-8)


def test_decoding_equals_the_full_pass_in_heads_that_are_not_width_over_heads():
    made, text = forward(model("rotary", head_size=12)), tokens(2)
    assert made.state["blocks"]["qkv"]["weight"].shape == (2, 32, 3 * 4 * 12)
    full = made.whole(text)
    np.testing.assert_allclose(made.decoded(text, 8), full, atol=2e-5)
    np.testing.assert_allclose(made.shifted(text), full, atol=2e-5)


def test_dynamic_rotary_scales_each_document_by_its_own_length():
    """Beyond the trained length, which no other law goes to: decoding is not the full pass there (the method)."""
    made, plain = forward(model("rotary_dynamic", position=position("rotary_dynamic", 8))), compiled("rotary", LENGTH)
    check_packing(made)
    text = tokens(4, LENGTH)
    assert jnp.abs(made.shifted(text) - plain.shifted(text)).max() > 1e-3
    short = [[1] * 8 + [0] * (LENGTH - 8)] * 4
    np.testing.assert_allclose(made.documents(text, short)[:, :8], plain.documents(text, short)[:, :8], atol=2e-5)
    np.testing.assert_allclose(made.whole(text), made.shifted(text), atol=2e-5)


def test_dynamic_rotary_turns_cached_keys_by_the_length_that_was_reached():
    """In one layer a cached token depends on nothing before it: the last token sees the keys of a full pass."""
    made, text = forward(model("rotary_dynamic", layers=1, position=position("rotary_dynamic", 8))), tokens(1)
    np.testing.assert_allclose(made.decoded(text, 4)[:, -1], made.whole(text)[:, -1], atol=2e-5)


@pytest.mark.parametrize("name, values", [("kerple_log", {"r1": 0.005, "r2": -1.0}), ("kerple_power", {"r2": 2.5})])
def test_a_parameter_beyond_its_bound_can_come_back(name, values):
    made, at = encoding(position(name)), contiguous(9)
    for key, value in values.items():
        getattr(made, key)[...] = jnp.full(4, value)
    graph, params = nnx.split(made)
    slopes = jax.jit(jax.grad(lambda params: nnx.merge(graph, params).bias(View(at, at, True)).sum()))(params)
    assert all(jnp.abs(slopes[key][...]).min() > 0 for key in values)


def test_sinusoids_are_the_papers():
    """Vaswani et al., section 3.5: sin(pos / 10000^(2i/D)) and cos of the same; here each fills half of the width."""
    added = encoding(position("sinusoidal")).embed(jnp.zeros((1, 3, 32)), contiguous(3))[0]
    angle = np.arange(3)[:, None] / 10_000.0 ** (2 * np.arange(16) / 32)
    np.testing.assert_allclose(added, np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=1e-6)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"name": "rotry"}, "unknown model.position.name 'rotry': did you mean rotary"),
        ({}, "model.position has no name"),
        ({"name": "rotary"}, "model.position lacks base"),
        ({"name": "rotary", "base": 1e4, "bass": 1}, "unknown key in model.position 'bass'"),
        ({"name": "rotary", "base": True}, "model.position.base=True: must be a finite number"),
        ({"name": "rotary", "base": float("nan")}, "model.position.base=nan: must be a finite number"),
        ({"name": "rotary", "base": 0.5}, "model.position.base=0.5: must be above 1"),
        ({"name": "sinusoidal", "base": 1.0, "scale": 1.0}, "model.position.base=1.0: must be above 1"),
        ({"name": "transformer_xl", "base": 0.0, "scale": 1.0}, "model.position.base=0.0: must be above 1"),
        ({"name": "learned", "limit": 0, "scale": 1.0}, "model.position.limit=0: must be at least 1"),
        ({"name": "relative_bias", "buckets": 32, "max_distance": 8, "scale": 1.0}, "max_distance > buckets/2"),
        ({"name": "rotary_partial", "base": 1e4, "fraction": 1.5}, "fraction=1.5: must be above 0 and at most 1"),
        (
            {"name": "rotary_partial", "base": 1e4, "fraction": 0.1},
            "fraction=0.1: turns nothing in a head of 8; at least 0.25",
        ),
        ({"name": "p_rope", "base": 1e4, "fraction": 0.0}, "fraction=0.0: must be above 0"),
        ({"name": "rotary_linear", "base": 1e4, "factor": 0.5}, r"factor=0.5: must be at least 1 \(how many times"),
        ({"name": "rotary_layered", "bases": (1e4, 0, 0)}, "a pattern of 3 layers, the model has 2"),
        ({"name": "rotary_layered", "bases": (0.5,)}, "bases=0.5: must be above 1"),
        (
            {"name": "yarn", "base": 1e4, "factor": 2, "trained_length": 8, "beta_fast": 1, "beta_slow": 2},
            "beta_fast=1: must be above 2",
        ),
        (
            {
                "name": "llama3",
                "base": 1e4,
                "factor": 2,
                "trained_length": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
            },
            "high_freq_factor=1: must be above 4",
        ),
        ({"name": "xpos", "base": 1e4, "fade": 0}, "fade=0: must be above 0"),
        ({"name": "sandwich", "size": 3}, "size=3: must be an even number"),
        ({"name": "fire", "hidden": 0, "threshold": 1.0}, "hidden=0: must be at least 1"),
        ({"name": "fire", "hidden": 1, "threshold": 0.0}, "threshold=0.0: must be above 0"),
        ({"name": "continuous_bias", "hidden": 0}, "hidden=0: must be at least 1"),
        ({"name": "shaw", "max_distance": 0, "scale": 1.0}, "max_distance=0: must be at least 1"),
        ({"name": "cope", "positions": 1, "scale": 0.0}, "positions=1: must be at least 2"),
    ],
)
def test_a_mistake_in_the_encoding_is_refused(row, words):
    with pytest.raises(Refusal, match=words):
        encoding(row)


@pytest.mark.parametrize("name", ["rotary_ntk", "rotary_dynamic"])
def test_a_head_of_one_plane_has_nothing_to_stretch(name):
    with pytest.raises(Refusal, match="the head size 2 has one plane"):
        positional.effects(position(name), SHAPE._replace(head_size=2))


def test_an_odd_head_size_is_refused_for_rotary():
    with pytest.raises(Refusal, match="the head size 9 is odd"):
        positional.effects(position("rotary"), SHAPE._replace(head_size=9))
    positional.effects(position("none"), SHAPE._replace(head_size=9))


@pytest.mark.parametrize("name", ["fire", "xpos", "cope"])
def test_an_encoding_that_only_looks_back_is_refused_by_name(name):
    with pytest.raises(Refusal, match=f"model.position.name={name} is defined only for keys before the query"):
        encoding(position(name), causal=False)


@pytest.mark.parametrize("some", [slice(None), slice(2, 5), slice(-3, None), slice(None, None, 2)])
def test_some_tokens_of_a_contiguous_row_keep_their_positions(some):
    whole = contiguous(6, 10)
    assert whole[some].index[0].tolist() == list(range(10, 16))[some]
    assert whole[some].start == (None if some.step else range(10, 16)[some].start)
