"""The Performer: random features compared with softmax, prefix sums with the matrix, RoFormer's Eq. 19 written out."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm import attention, training
from rope_lm.attention.performer import Performer, causal_sums, log_features, projection
from rope_lm.kernels import softmax
from rope_lm.positional import RotaryFeatures
from rope_lm.positional.rotary import frequencies
from rope_lm.positions import View, contiguous
from rope_lm.refusal import Refusal
from tests.models import PERFORMER, compiled, encoding, model, packed, tokens
from tests.positional.test_laws import CLAIMS, check_packing
from tests.programs import program


def inputs(length: int, heads: int = 3, size: int = 8) -> tuple[jax.Array, ...]:
    q, k, v, g = (jax.random.normal(key, (2, length, heads, size)) for key in jax.random.split(jax.random.key(0), 4))
    return q, k, v, g


def unturned(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    return q, k


def attend(made: Performer, given: tuple[jax.Array, ...], causal: bool, known: bool, seed: int = 0) -> jax.Array:
    """Attend in rows that are known to be contiguous, or not."""
    q, k, v = given
    drawn = made.draw(jax.random.key(seed), 1, q.shape[-1])[0]
    at = contiguous(q.shape[1]) if known else packed(jnp.ones(q.shape[:2], jnp.int32))
    return made(q, k, v, View(at, at, causal), None, unturned, drawn)


@pytest.mark.parametrize(
    "causal, counts",
    [
        (True, (64, 1024)),
        *(pytest.param(causal, (64, 256, 1024, 4096), marks=pytest.mark.all) for causal in (True, False)),
    ],
)
def test_features_approximate_softmax_attention_with_an_error_that_falls_as_they_grow(causal, counts):
    """The error falls as one over the square root of their number: to a quarter for sixteen times the features."""
    q, k, v, _ = inputs(32)
    q, k, at = q / 2, k / 2, contiguous(32)  # a fourth of the logits, because the error grows with them
    exact = softmax.plain(q, k, v, View(at, at, causal), None, 8**-0.5)

    @partial(jax.jit, static_argnums=0)
    def error(count: int) -> jax.Array:
        made = Performer(features=count, redraw=1, block=16, head_size=8)

        def apart(seed: jax.Array) -> jax.Array:
            return attend(made, (q, k, v), causal, True, seed) - exact

        return jnp.abs(jax.vmap(apart)(jnp.arange(16))).mean()

    errors = {count: float(error(count)) for count in counts}
    for fewer, more in itertools.pairwise(counts):
        assert 0.75 < errors[fewer] / errors[more] / (more / fewer) ** 0.5 < 1.25
    assert errors[counts[-1]] < 0.01 * (4096 / counts[-1]) ** 0.5


def test_the_kernel_is_unbiased():
    """The mean over draws of phi(q) phi(k) is exp(q k / sqrt(H))."""
    q, k, _, _ = (x.swapaxes(1, 2) / 2 for x in inputs(4))
    exact = jnp.exp(q @ k.swapaxes(2, 3) / np.sqrt(8))

    @jax.jit
    @jax.vmap
    def kernel(seed: jax.Array) -> jax.Array:
        drawn = projection(jax.random.key(seed), 256, 8)
        phi_q, phi_k = (jnp.exp(log_features(x, drawn, 8)) for x in (q, k))
        return phi_q @ phi_k.swapaxes(2, 3) / 256

    found = kernel(jnp.arange(200))
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert np.mean(np.abs(np.mean(found, axis=0) - exact) < 2 * error) > 0.85


def test_drawing_directions_waits_for_no_threads():
    """LAPACK's QR of several matrices never ended on two devices that share two threads."""
    drawn = jax.jit(lambda key: Performer(features=64, redraw=9, block=64, head_size=32).draw(key, 4, 32))
    assert "lapack" not in drawn.lower(jax.random.key(0)).compile().as_text()


def test_directions_are_those_of_qr_with_a_positive_diagonal():
    """The directions of archived runs."""
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


@pytest.mark.parametrize("length", [17, *(pytest.param(n, marks=pytest.mark.all) for n in (1, 15, 16, 100))])
def test_the_prefix_form_equals_the_masked_matrix_in_values_and_gradients(length):
    *given, g = inputs(length)
    made = Performer(features=16, redraw=1, block=16, head_size=8)

    @partial(jax.jit, static_argnums=0)
    def run(known: bool) -> tuple:
        value, pull = jax.vjp(lambda *given: attend(made, given, True, known), *given)
        return value, *pull(g)

    for prefix, matrix in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(prefix, matrix, atol=1e-5)


def test_causal_sums_are_the_sums_written_out():
    q, k, v = (x.swapaxes(1, 2) for x in inputs(20)[:3])
    expected = [sum((q[0, 0, i] @ k[0, 0, j]) * v[0, 0, j] for j in range(i + 1)) for i in range(20)]
    np.testing.assert_allclose(causal_sums(q, k, v, 8)[0, 0], np.array(expected), atol=1e-4)


def test_memory_is_linear_in_the_length():
    def temporary(length: int) -> int:
        q = k = v = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        made = Performer(features=16, redraw=1, block=16, head_size=8)
        run = jax.jit(lambda *given: attend(made, given, True, True))
        return run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)


def test_rotary_features_are_eq_19_of_roformer():
    """sum_j (R_i phi(q_i)) (R_j phi(k_j)) v_j / sum_j phi(q_i) phi(k_j): the denominator is not turned."""
    made, q_k_v = Performer(features=16, redraw=1, block=8, head_size=8), inputs(12, heads=4)[:3]
    at, drawn = contiguous(12), made.draw(jax.random.key(1), 1, 8)[0]
    view, turning = View(at, at, True), encoding({"name": "rotary_features", "base": 1e4})
    assert isinstance(turning, RotaryFeatures)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return made(q, k, v, view, None, partial(turning.turn_features, view=view), drawn)

    found = run(*q_k_v)

    phi_q, phi_k = (np.exp(log_features(x.swapaxes(1, 2), drawn, 8)) for x in q_k_v[:2])
    turn = np.exp(1j * np.arange(12)[:, None] * frequencies(16, 10_000.0))
    turned_q, turned_k = ((x[..., :8] + 1j * x[..., 8:]) * turn for x in (phi_q, phi_k))
    scores = np.real(np.einsum("bntf,bnsf->bnts", turned_q, np.conj(turned_k))) * np.tril(np.ones((12, 12)))
    plain = np.einsum("bntf,bnsf->bnts", phi_q, phi_k) * np.tril(np.ones((12, 12)))
    expected = np.einsum("bnts,bsnh->btnh", scores / plain.sum(-1, keepdims=True), np.asarray(q_k_v[2]))
    np.testing.assert_allclose(found, expected, atol=2e-5)


LINEAR = ("none", "learned", "sinusoidal", "rotary", "rotary_sinusoidal")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("none", "rotary") else pytest.mark.all) for name in LINEAR]
)
def test_the_laws_hold_with_features(name):
    """Decoding, packing, contiguous rows and causality; `rotary_features` is among the encodings of test_laws."""
    assert name in CLAIMS
    made, text = compiled(name, performer=True), tokens(4)
    full = made.whole(text)
    np.testing.assert_allclose(made.decoded(text, 8), full, atol=5e-5)
    np.testing.assert_allclose(made.shifted(text), full, atol=5e-5)
    check_packing(made, 32)
    changed = text.at[:, 20].add(1) % 17
    np.testing.assert_allclose(made.whole(changed)[:, :20], full[:, :20], atol=5e-5)


@pytest.mark.parametrize("name", ["relative_bias", "alibi", "fire", "shaw", "cope"])
def test_an_encoding_that_adds_to_logits_is_refused_by_name(name):
    with pytest.raises(
        Refusal, match=f"model.position.name={name} adds to the logits of attention, linear attention has none"
    ):
        model(name, attention=PERFORMER)


def test_an_encoding_that_scales_queries_against_keys_is_refused_by_name():
    with pytest.raises(Refusal, match="xpos scales queries and keys by each other's positions"):
        model("xpos", attention=PERFORMER)


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
def test_a_mistake_in_the_section_is_refused(change, words):
    with pytest.raises(Refusal, match=words):
        attention.make(PERFORMER | change, head_size=8)


def test_features_are_drawn_again_on_schedule_as_a_function_of_the_seed_and_the_number_of_the_draw():
    made = program("rotary", model={"attention": PERFORMER})
    untrained = jax.jit(partial(training.untrained, made.spec))

    def drawn(step: int, seed: int) -> np.ndarray:
        return np.asarray(untrained(jnp.uint32(seed), jnp.int32(step))["drawn"])

    np.testing.assert_array_equal(drawn(0, 0), drawn(9, 0))
    assert np.abs(drawn(9, 0) - drawn(10, 0)).max() > 0.1, "the eleventh step has another draw"
    assert np.abs(drawn(0, 0) - drawn(0, 1)).max() > 0.1, "another seed has another draw"
    assert np.abs(drawn(0, 0)[0] - drawn(0, 0)[1]).max() > 0.1, "another layer has another draw"
    assert "drawn" not in made.abstract.params and training.STREAMS == ("params", "position", "features", "objective")
