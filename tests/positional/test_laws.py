"""The laws that hold over all encodings, and the properties that each one claims."""

import hypothesis
import hypothesis.strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.presets import FOR_FEATURES, POSITIONS
from rope_lm import positional
from rope_lm.attention.softmax import blocks
from rope_lm.positional.rotary import angles, frequencies, rotate, upper_bound, wave
from rope_lm.positions import Positions, contiguous, packed
from rope_lm.refusal import Refusal
from tests.models import LENGTH, model, position, tokens

# What each encoding claims. A new encoding adds its row here.
CLAIMS = {
    "none": {"shift_invariant": True, "sees_order": False, "limited": False},
    "learned": {"shift_invariant": False, "sees_order": True, "limited": True},
    "sinusoidal": {"shift_invariant": False, "sees_order": True, "limited": False},
    "relative_bias": {"shift_invariant": True, "sees_order": True, "limited": False},
    "alibi": {"shift_invariant": True, "sees_order": True, "limited": False},
    "kerple_log": {"shift_invariant": True, "sees_order": True, "limited": False},
    "kerple_power": {"shift_invariant": True, "sees_order": True, "limited": False},
    "fire": {"shift_invariant": False, "sees_order": True, "limited": False},
    "continuous_bias": {"shift_invariant": True, "sees_order": True, "limited": False},
    "sandwich": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary_partial": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary_layered": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary_linear": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary_ntk": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary_dynamic": {"shift_invariant": False, "sees_order": True, "limited": False},
    "yarn": {"shift_invariant": True, "sees_order": True, "limited": False},
    "llama3": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary_features": {"shift_invariant": True, "sees_order": True, "limited": False},
    "rotary_sinusoidal": {"shift_invariant": False, "sees_order": True, "limited": False},
    "xpos": {"shift_invariant": True, "sees_order": True, "limited": False},
    "p_rope": {"shift_invariant": True, "sees_order": True, "limited": False},
    "shaw": {"shift_invariant": True, "sees_order": True, "limited": False},
    "transformer_xl": {"shift_invariant": True, "sees_order": True, "limited": False},
    "cope": {"shift_invariant": True, "sees_order": True, "limited": False},
}
place = hypothesis.strategies.integers(0, 100_000)
half = hypothesis.strategies.integers(1, 32)
base = hypothesis.strategies.floats(2, 1e7)
every_encoding = pytest.mark.parametrize("name", sorted(positional.ENCODINGS))
BOTH_WAYS = [name for name in CLAIMS if not positional.ENCODINGS[name].backward]
EVERY_WAY = [(name, True) for name in sorted(positional.ENCODINGS)] + [(name, False) for name in BOTH_WAYS]


def claimants(claim: str, holds: bool = True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, row in CLAIMS.items() if row[claim] == holds])


def strong(name: str, **changes: object):
    """A model whose trained vectors are as large as its logits: initial values near 0 would hide a mistake in them."""
    if "scale" in POSITIONS[name]:
        changes = {"position": position(name)} | changes
        changes["position"] = changes["position"] | {"scale": 1.0}
    if name == "fire":
        changes["position"] = position(name) | {"threshold": 8.0}
    if name == "rotary_layered" and changes.get("layers") == 1:
        changes["position"] = position(name) | {"bases": (10_000.0,)}
    made = model(name, **changes)
    if name == "fire":
        made.position.second[...] = 10 * made.position.second[...]
    return made


def test_the_tables_of_configs_library_and_claims_have_the_same_keys():
    assert set(POSITIONS) == set(positional.ENCODINGS) == set(CLAIMS)
    assert list(FOR_FEATURES) == [name for name, cls in positional.ENCODINGS.items() if cls.turns_features()]


@every_encoding
def test_cached_decoding_equals_the_full_forward_pass(name):
    made, text = strong(name), tokens(2)
    full, _ = made(text)
    cache, pieces, at = made.cache(2, LENGTH), [], 0
    for size in (5, 1, 1, 9, 16):
        logits, cache = made(text[:, at : at + size], contiguous(size, at), cache)
        pieces.append(logits)
        at += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=2e-5)


@every_encoding
def test_decoding_goes_on_after_the_oldest_half_of_the_cache_was_dropped(name):
    """Slots are given up and the rest moves to the front: what is left keeps its positions."""
    made, text = strong(name), tokens(2)
    _, cache = made(text[:, :20], contiguous(20), made.cache(2, LENGTH))
    at = cache.positions
    hidden = cache._replace(positions=Positions(at.index, at.segment.at[:, :10].set(0)))
    kept, _ = made(text[:, 20:], contiguous(LENGTH - 20, 20), hidden)
    moved, _ = made(text[:, 20:], contiguous(LENGTH - 20, 20), cache.forget(10))
    np.testing.assert_allclose(moved, kept, atol=2e-5)
    assert jnp.abs(moved - made(text)[0][:, 20:]).max() > 1e-3, "the dropped half is not seen any more"


@every_encoding
def test_packed_documents_equal_the_same_documents_apart(name):
    made, text = strong(name), tokens(1)
    segment = jnp.array([[1] * 10 + [2] * 15 + [0] * 7])
    together, _ = made(text, packed(segment))
    first, _ = made(text[:, :10])
    second, _ = made(text[:, 10:25])
    np.testing.assert_allclose(together[:, :25], jnp.concatenate([first, second], 1), atol=2e-5)


@every_encoding
def test_left_padding_changes_nothing(name):
    made, text = strong(name), tokens(1)
    padded, _ = made(text, packed(jnp.array([[0] * 12 + [1] * 20])))
    alone, _ = made(text[:, 12:])
    np.testing.assert_allclose(padded[:, 12:], alone, atol=2e-5)


def test_dynamic_rotary_scales_each_document_by_its_own_length():
    """Beyond the trained length, which no other law goes to: there decoding is not the full pass (the method)."""
    made, text = model("rotary_dynamic", position=position("rotary_dynamic", 8)), tokens(1)
    apart = jnp.concatenate([made(text[:, :10])[0], made(text[:, 10:25])[0]], 1)
    together, _ = made(text, packed(jnp.array([[1] * 10 + [2] * 15 + [0] * 7])))
    np.testing.assert_allclose(together[:, :25], apart, atol=2e-5)
    padded, _ = made(text, packed(jnp.array([[0] * 22 + [1] * 10])))
    np.testing.assert_allclose(padded[:, 22:], made(text[:, 22:])[0], atol=2e-5)
    plain = model("rotary")
    assert jnp.abs(made(text)[0] - plain(text)[0]).max() > 1e-3
    np.testing.assert_allclose(made(text[:, :8])[0], plain(text[:, :8])[0], atol=2e-5)


def test_dynamic_rotary_turns_cached_keys_by_the_length_that_was_reached():
    """In one layer what is cached hangs on nothing that was read before: the last token sees what a full pass shows."""
    made, text = strong("rotary_dynamic", layers=1, position=position("rotary_dynamic", 8)), tokens(1)
    cache = made.cache(1, LENGTH)
    for at in range(0, LENGTH, 4):
        logits, cache = made(text[:, at : at + 4], contiguous(4, at), cache)
    np.testing.assert_allclose(logits[:, -1], made(text)[0][:, -1], atol=2e-5)


@pytest.mark.parametrize("name, values", [("kerple_log", {"r1": 0.005, "r2": -1.0}), ("kerple_power", {"r2": 2.5})])
def test_a_parameter_beyond_its_bound_can_come_back(name, values):
    made = model(name).position
    for key, value in values.items():
        getattr(made, key)[...] = jnp.full(4, value)
    graph, params = nnx.split(made)
    total = lambda params: nnx.merge(graph, params).bias(contiguous(9), contiguous(9)).sum()  # noqa: E731
    slopes = nnx.to_pure_dict(jax.grad(total)(params))
    assert all(jnp.abs(slopes[key]).min() > 0 for key in values)


@every_encoding
def test_what_an_encoding_adds_is_float32_under_bfloat16(name):
    """bfloat16 rounds 257 to 256, and 1.01 to 1: at far indices an encoding is as exact as in float32."""
    made = strong(name, position=position(name, 1024), dtype="bfloat16").position
    at, layer = contiguous(24, 1000), jnp.int32(0)
    x = jax.random.normal(jax.random.key(0), (2, 24, 4, 8)).astype(jnp.bfloat16)
    of_layer = jax.tree.map(lambda each: each[0], made.prepare(at, at))
    bias, score = made.bias(at, at), made.score(x, x, at, at, of_layer, blocks(24, causal=False))
    for added in (bias, *(score or [])):
        assert added is None or added.dtype == jnp.float32
    wide = x.astype(jnp.float32)
    narrow, exact = (made.rotate(each, each, at, at, layer) for each in (x, wide))
    for ours, theirs in zip(narrow, exact, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("name, causal", EVERY_WAY)
@pytest.mark.parametrize("length", [1, 80])
def test_what_is_known_of_whole_rows_changes_nothing(name, causal, length):
    """Their mask, their distances, and what blocks of queries see (80 tokens are two blocks, one of them short)."""
    made, text = strong(name, causal=causal, position=position(name, 80)), tokens(2, length)
    np.testing.assert_allclose(made(text)[0], made(text, packed(jnp.ones_like(text)))[0], atol=2e-5)


@pytest.mark.parametrize("name, causal", [each for each in EVERY_WAY if positional.ENCODINGS[each[0]].biased()])
def test_what_is_known_of_distances_changes_no_gradient(name, causal):
    """In two blocks of queries, one of them short."""
    made, text = strong(name, causal=causal, layers=1, position=position(name, 80)), tokens(2, 80)
    graph, params, rest = nnx.split(made, nnx.Param, ...)

    @jax.jit
    def slopes(params: nnx.State, where: Positions) -> nnx.State:
        return jax.grad(lambda params: jnp.square(nnx.merge(graph, params, rest)(text, where)[0]).mean())(params)

    known, unknown = slopes(params, contiguous(80)), slopes(params, packed(jnp.ones_like(text)))
    for ours, theirs in zip(jax.tree.leaves(known), jax.tree.leaves(unknown), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, jnp.abs(theirs).max()))


@every_encoding
def test_a_later_token_changes_nothing_before_it(name):
    made, text = strong(name), tokens(1)
    changed = text.at[0, 20].set((text[0, 20] + 1) % 17)
    before, after = made(text)[0], made(changed)[0]
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert jnp.abs(before - after)[:, 20:].max() > 1e-3


@every_encoding
def test_shifting_all_positions_changes_nothing_where_that_is_claimed(name):
    row = position(name)  # with room for the shift where there is a limit, but trained on no more
    made, text = strong(name, position=row | ({"limit": 1000 + LENGTH} if "limit" in row else {})), tokens(2)
    shift = 5 if name == "sinusoidal" else 1000
    difference = jnp.abs(made(text, contiguous(LENGTH))[0] - made(text, contiguous(LENGTH, shift))[0]).max()
    if CLAIMS[name]["shift_invariant"]:
        assert difference < 2e-3  # float32 angles at index 1000 are exact to 1e-4 radians
    else:
        assert difference > 1e-2


@every_encoding
def test_order_is_seen_where_that_is_claimed(name):
    """The last token's logits, when two earlier tokens of a one-layer model change places."""
    made, text = strong(name, layers=1), tokens(1).at[0, 27].set(1).at[0, 29].set(2)
    swapped = text.at[0, 27].set(2).at[0, 29].set(1)
    difference = jnp.abs(made(text)[0] - made(swapped)[0])[0, -1].max()
    assert (difference > 1e-3) == CLAIMS[name]["sees_order"]


@claimants("limited")
def test_past_the_limit_is_an_error_and_never_a_clamped_row(name):
    made = model(name)
    assert bool(jnp.isfinite(made(tokens(1))[0]).all())
    beyond, _ = made(tokens(1), contiguous(LENGTH, 1))
    assert bool(jnp.isnan(beyond[:, -1]).all()), "index LENGTH has no row"
    with pytest.raises(Refusal, match=f"below {LENGTH}, the rows have {LENGTH + 1} tokens: set model.position.limit"):
        made.position.check(LENGTH + 1)
    made.position.check(LENGTH)


@claimants("limited", holds=False)
def test_without_a_limit_any_index_is_finite(name):
    assert bool(jnp.isfinite(model(name)(tokens(1), contiguous(LENGTH, 1_000_000))[0]).all())


@hypothesis.given(place, half, base, hypothesis.strategies.integers(0, 2**31 - 1))
def test_rotation_preserves_norms(start, planes, base, seed):
    x = jax.random.normal(jax.random.key(seed), (2, 8, 4, 2 * planes))
    turned = rotate(x, wave(angles(contiguous(8, start).index, frequencies(2 * planes, base))))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert start == 0 or jnp.abs(turned - x).max() > 1e-3


@hypothesis.given(place, place, place, half, base)
def test_a_rotated_product_hangs_on_the_distance_alone(first, second, shift, planes, base):
    q, k = jax.random.normal(jax.random.key(planes), (2, 1, 1, 1, 2 * planes))
    turned = lambda x, at: rotate(x, wave(angles(jnp.array([[at]]), frequencies(2 * planes, base))))  # noqa: E731
    products = [jnp.vdot(turned(q, first + by), turned(k, second + by)) for by in (0, shift)]
    np.testing.assert_allclose(*products, atol=2e-3 * planes)


@pytest.mark.parametrize("index", [1, 1023, 1024, 99_999, 1_000_000, 2_000_000])
def test_angles_are_right_to_a_milliradian_at_a_million(index):
    exact = np.float64(index) * frequencies(64, 1e4)
    ours = np.asarray(angles(jnp.array([[index]]), frequencies(64, 1e4))[0, 0], np.float64)
    off = np.abs(np.exp(1j * ours) - np.exp(1j * exact)).max()
    assert off < 1e-3
    naive = np.float32(index) * frequencies(64, 1e4).astype(np.float32)
    assert index < 1_000_000 or np.abs(np.exp(1j * naive.astype(np.float64)) - np.exp(1j * exact)).max() > 1e-2


def test_a_far_pairs_expected_score_decays():
    """RoFormer, section 3.4.3: what bounds the score of two tokens falls with their distance."""
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
        matrix[np.ix_([i, i + size // 2], [i, i + size // 2])] = [
            [np.cos(angle), -np.sin(angle)],
            [np.sin(angle), np.cos(angle)],
        ]
    x = np.random.default_rng(0).normal(size=size)
    ours = rotate(
        jnp.asarray(x, jnp.float32)[None, None, None], wave(angles(jnp.array([[at]]), frequencies(size, 1e4)))
    )
    np.testing.assert_allclose(ours[0, 0, 0], matrix @ x, atol=1e-5)


def test_angles_are_float32_under_bfloat16():
    """bfloat16 rounds 257 to 256: the two positions would then be one."""
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = rotate(x, wave(angles(jnp.array([[256, 257]]), frequencies(8, 1e4))))
    assert turned.dtype == jnp.bfloat16
    assert jnp.abs(turned[0, 0] - turned[0, 1]).astype(jnp.float32).max() > 0.1


def test_sinusoids_are_the_papers():
    """Vaswani et al., section 3.5: sin(pos / 10000^(2i/D)), cos of the same; ours stand in halves."""
    made = model("sinusoidal").position
    added = made.embed(jnp.zeros((1, 3, 32)), contiguous(3))[0]
    expected = np.zeros((3, 32))
    for at in range(3):
        for i in range(16):
            expected[at, i] = np.sin(at / 10000 ** (2 * i / 32))
            expected[at, 16 + i] = np.cos(at / 10000 ** (2 * i / 32))
    np.testing.assert_allclose(added, expected, atol=1e-6)


def test_the_model_draws_shared_parameters_without_regard_to_the_encoding():
    reference = nnx.to_pure_dict(nnx.state(model("none"), nnx.Param))
    for name in positional.ENCODINGS:
        made = nnx.to_pure_dict(nnx.state(model(name), nnx.Param))
        made.pop("position", None)
        for path, leaf in jax.tree.leaves_with_path(made):
            np.testing.assert_array_equal(leaf, dict(jax.tree.leaves_with_path(reference))[path])


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
def test_a_mistake_in_the_encoding_is_one_line(row, words):
    with pytest.raises(Refusal, match=words):
        model("none", position=row)


@pytest.mark.parametrize("name", ["rotary_ntk", "rotary_dynamic"])
def test_a_head_of_one_plane_has_nothing_to_stretch(name):
    with pytest.raises(Refusal, match="the head size 8/4 = 2 has one plane"):
        model(name, width=8)


def test_an_odd_head_size_is_refused_for_rotary():
    with pytest.raises(Refusal, match="head size 36/4 = 9 is odd"):
        model("rotary", width=36)
    model("none", width=36)


def test_padding_and_packing_positions():
    made = packed(jnp.array([[0, 0, 1, 1, 1, 2, 2, 0]]))
    np.testing.assert_array_equal(made.index[0], [0, 1, 0, 1, 2, 0, 1, 0])
    assert isinstance(made, Positions)


@pytest.mark.parametrize("some", [slice(None), slice(2, 5), slice(-3, None), slice(None, None, 2)])
def test_some_of_a_whole_row_stand_where_they_stood(some):
    whole = contiguous(6, 10)
    assert whole[some].index[0].tolist() == list(range(10, 16))[some]
    assert whole[some].start == (None if some.step else range(10, 16)[some].start)


# --- where tokens see what is ahead of them ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_bidirectional_model_sees_what_is_ahead_and_its_document_alone(name):
    made, text = strong(name, causal=False), tokens(1)
    assert jnp.abs(made(text)[0] - made(text.at[0, -1].add(1) % 17)[0])[0, 0].max() > 1e-6
    together, _ = made(text, packed(jnp.array([[1] * 10 + [2] * 15 + [0] * 7])))
    apart = jnp.concatenate([made(text[:, :10])[0], made(text[:, 10:25])[0]], 1)
    np.testing.assert_allclose(together[:, :25], apart, atol=2e-5)
    np.testing.assert_allclose(made(text)[0], made(text, packed(jnp.ones_like(text)))[0], atol=2e-5)


@pytest.mark.parametrize("name", [name for name in BOTH_WAYS if CLAIMS[name]["shift_invariant"]])
def test_a_shift_changes_nothing_in_a_bidirectional_model(name):
    made, text = strong(name, causal=False, position=position(name, 1000)), tokens(2)
    np.testing.assert_allclose(made(text, contiguous(LENGTH, 500))[0], made(text)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["fire", "xpos", "cope"])
def test_an_encoding_that_looks_back_alone_is_refused_by_name(name):
    with pytest.raises(Refusal, match=f"model.position.name={name} is defined for keys before the query alone"):
        model(name, causal=False)
