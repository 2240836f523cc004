"""The Performer: random features against softmax, prefix sums against the matrix, RoFormer's Eq. 19 written out."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm import attention, training
from rope_lm.attention.performer import Performer, causal_sums, features, projection
from rope_lm.positional.rotary import frequencies
from rope_lm.positions import contiguous, packed
from rope_lm.refusal import Refusal
from tests.attention.test_softmax import reference
from tests.models import LENGTH, VOCABULARY, model, position, tokens
from tests.test_training import program

SECTION = {"name": "performer", "features": 16, "redraw": 10, "block": 8}


def inputs(length: int, heads: int = 3, size: int = 8):
    q, k, v, g = (jax.random.normal(key, (2, length, heads, size)) for key in jax.random.split(jax.random.key(0), 4))
    return q, k, v, g


def attend(count: int, q, k, v, causal: bool, plain: bool, block: int = 16, seed: int = 0, turn=None):
    made = Performer(features=count, redraw=1, block=block)
    drawn = made.draw(jax.random.key(seed), 1, q.shape[-1])[0]
    where = contiguous(q.shape[1]) if plain else packed(jnp.ones(q.shape[:2], jnp.int32))
    return made(q, k, v, where, where, None, turn, causal, drawn)


@pytest.mark.parametrize("causal", [True, False])
def test_features_approximate_softmax_attention_with_an_error_that_falls_as_they_grow(causal):
    """As one over the square root of their number: a quarter of the error for sixteen times the features."""
    q, k, v, _ = inputs(32)
    q, k = q / 2, k / 2  # logits of a fourth: of greater ones the error is greater, and its tail heavier
    exact = reference(q, k, v, None, causal)

    @partial(jax.jit, static_argnums=0)
    def error(count: int) -> jax.Array:
        apart = lambda seed: attend(count, q, k, v, causal, True, seed=seed) - exact  # noqa: E731
        return jnp.abs(jax.vmap(apart)(jnp.arange(16))).mean()

    errors = [float(error(count)) for count in (64, 256, 1024, 4096)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01
    assert 3 < errors[0] / errors[2] < 5 and 3 < errors[1] / errors[3] < 5


def test_the_kernel_is_unbiased():
    """The mean over draws of phi(q) phi(k) is exp(q k / sqrt(H))."""
    q, k, _, _ = (x.swapaxes(1, 2) / 2 for x in inputs(4))
    exact = jnp.exp(q @ k.swapaxes(2, 3) / np.sqrt(8))
    found = [
        jnp.exp(features(q, drawn)) @ jnp.exp(features(k, drawn)).swapaxes(2, 3) / 256
        for drawn in (projection(jax.random.key(seed), 256, 8) for seed in range(200))
    ]
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert np.mean(np.abs(np.mean(found, axis=0) - exact) < 2 * error) > 0.85


def test_nothing_that_is_drawn_waits_for_threads():
    """On two devices that share two threads, LAPACK's QR of several matrices did, for ever."""
    drawn = jax.jit(lambda key: Performer(features=64, redraw=9, block=64).draw(key, 4, 32))
    assert "lapack" not in drawn.lower(jax.random.key(0)).compile().as_text()


def test_directions_are_those_of_qr_with_a_positive_diagonal():
    """As they were drawn for the archived runs."""
    turn, length = jax.random.split(jax.random.key(3))
    q, r = jnp.linalg.qr(jax.random.normal(turn, (2, 32, 32)))
    expected = (q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]).swapaxes(1, 2).reshape(64, 32)
    norms = jnp.linalg.norm(jax.random.normal(length, (64, 32)), axis=-1, keepdims=True)
    np.testing.assert_allclose(projection(jax.random.key(3), 64, 32), expected * norms, atol=1e-4)


def test_directions_are_orthogonal_within_a_head_and_as_long_as_gaussian_vectors():
    drawn = np.asarray(projection(jax.random.key(0), 1024, 16))
    for block in drawn.reshape(-1, 16, 16):
        angles = block @ block.T
        np.testing.assert_allclose(angles - np.diag(np.diag(angles)), 0, atol=1e-4)
    assert np.mean(np.sum(drawn**2, -1)) == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_the_prefix_form_equals_the_masked_matrix_in_values_and_gradients(length):
    q, k, v, g = inputs(length)
    both = [jax.vjp(lambda q, k, v, plain=plain: attend(16, q, k, v, True, plain), q, k, v) for plain in (True, False)]
    np.testing.assert_allclose(both[0][0], both[1][0], atol=1e-5)
    for a, b in zip(both[0][1](g), both[1][1](g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_flops_count_the_products_of_turned_features_beside_those_of_the_denominator():
    """Of the matrix within a block half is computed for nothing, and not counted."""
    made, x = Performer(features=64, redraw=9, block=16), jnp.zeros((1, 64, 2, 32))
    drawn, where = jnp.zeros((64, 32)), contiguous(64)

    def products(jaxpr) -> int:
        found = 0
        for equation in jaxpr.eqns:
            found += sum(map(products, jax.core.jaxprs_in_params(equation.params)))
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
                found += size * math.prod(equation.outvars[0].aval.shape)
        return found

    def more(turn) -> int:
        return products(jax.make_jaxpr(lambda x: made(x, x, x, where, where, None, turn, True, drawn))(x).jaxpr) / 64

    computed = more(lambda q, k: (q, k)) - more(None)
    counted = made.flops(64, 2, 64, True, True) - made.flops(64, 2, 64, True, False)
    assert computed == 2 * 64 * 16 and counted == computed * (16 + 1) / 2 / 16


def test_causal_sums_are_the_sums_written_out():
    q, k, v = (x.swapaxes(1, 2) for x in inputs(20)[:3])
    expected = [sum((q[0, 0, i] @ k[0, 0, j]) * v[0, 0, j] for j in range(i + 1)) for i in range(20)]
    np.testing.assert_allclose(causal_sums(q, k, v, 8)[0, 0], np.array(expected), atol=1e-4)


def test_memory_is_linear_in_the_length():
    def temporary(length: int) -> int:
        q, k, v, _ = inputs(length)
        run = jax.jit(lambda q, k, v: attend(16, q, k, v, True, True))
        return run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)


def test_rotary_features_are_eq_19_of_roformer():
    """sum_j (R_i phi(q_i)) (R_j phi(k_j)) v_j / sum_j phi(q_i) phi(k_j): the denominator is not turned."""
    made = model("rotary_features", layers=1)
    q, k, v, _ = inputs(12, heads=4)
    where, drawn = contiguous(12), made.drawn[...][0]
    turn = lambda q, k: made.position.turn_features(q, k, where, where, jnp.int32(0))  # noqa: E731
    found = made.attention(q, k, v, where, where, None, turn, True, drawn)

    phi_q, phi_k = (np.exp(features(x.swapaxes(1, 2), drawn)) for x in (q, k))
    angle = np.arange(12)[:, None] * frequencies(16, 10_000.0)
    whole = np.exp(1j * angle)
    turned = lambda x: (x[..., :8] + 1j * x[..., 8:]) * whole  # noqa: E731
    scores = np.real(np.einsum("bntf,bnsf->bnts", turned(phi_q), np.conj(turned(phi_k)))) * np.tril(np.ones((12, 12)))
    plain = np.einsum("bntf,bnsf->bnts", phi_q, phi_k) * np.tril(np.ones((12, 12)))
    expected = np.einsum("bnts,bsnh->btnh", scores / plain.sum(-1, keepdims=True), np.asarray(v))
    np.testing.assert_allclose(found, expected, atol=2e-5)


LINEAR = ("none", "learned", "sinusoidal", "rotary", "rotary_features", "rotary_sinusoidal")


@pytest.mark.parametrize("name", LINEAR)
def test_cached_packed_and_padded_rows_with_features(name):
    made, text = model(name, attention=SECTION), tokens(2)
    full, _ = made(text)
    cache, pieces, at = made.cache(2, LENGTH), [], 0
    for size in (5, 1, 1, 9, 16):
        logits, cache = made(text[:, at : at + size], contiguous(size, at), cache)
        pieces.append(logits)
        at += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=5e-5)
    np.testing.assert_allclose(made(text, packed(jnp.ones_like(text)))[0], full, atol=5e-5)
    changed = text.at[:, 20].add(1) % VOCABULARY
    np.testing.assert_allclose(made(changed)[0][:, :20], full[:, :20], atol=5e-5)


@pytest.mark.parametrize("name", ["relative_bias", "alibi", "fire", "shaw", "cope"])
def test_what_adds_to_logits_is_refused_by_name(name):
    with pytest.raises(
        Refusal, match=f"model.position.name={name} adds to the logits of attention, linear attention has none"
    ):
        model(name, attention=SECTION)


def test_what_scales_queries_against_keys_is_refused_by_name():
    with pytest.raises(Refusal, match="xpos scales queries and keys by where the others are"):
        model("xpos", attention=SECTION)


def test_what_turns_features_is_refused_where_there_are_none():
    with pytest.raises(
        Refusal, match="rotary_features turns the features of linear attention, softmax attention has none"
    ):
        model("rotary_features", attention={"name": "softmax", "kernel": "xla"})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"features": 0}, "model.attention.features=0: must be at least 1"),
        ({"features": 7}, "model.attention.features=7: must be even"),
        ({"redraw": 0}, "model.attention.redraw=0"),
        ({"block": 0}, "model.attention.block=0"),
        ({"name": "perfomer"}, "unknown model.attention.name 'perfomer': did you mean performer"),
        ({"kernel": "xla"}, "unknown key in model.attention 'kernel'"),
    ],
)
def test_attention_that_cannot_be_is_refused(change, words):
    with pytest.raises(Refusal, match=words):
        attention.make(SECTION | change)


def test_features_are_drawn_again_on_schedule_as_a_function_of_the_seed_and_the_number_of_the_draw():
    made = program("rotary", 2, model={"attention": SECTION, "position": position("rotary")})
    state = made.init(np.array([0, 1], np.uint32), np.full(2, 1e-2, np.float32))
    drawn = lambda step, i: np.asarray(made.model(state._replace(step=jnp.int32(step)), i).drawn[...])  # noqa: E731
    np.testing.assert_array_equal(drawn(0, 0), drawn(9, 0))
    assert np.abs(drawn(9, 0) - drawn(10, 0)).max() > 0.1, "the eleventh step has another draw"
    assert np.abs(drawn(0, 0) - drawn(0, 1)).max() > 0.1, "another seed has another draw"
    assert np.abs(drawn(0, 0)[0] - drawn(0, 0)[1]).max() > 0.1, "another layer has another draw"
    assert "drawn" not in state.params and training.STREAMS == ("params", "position", "features", "objective")
