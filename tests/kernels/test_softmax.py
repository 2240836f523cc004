"""Kernels of softmax attention compared with its definition, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm.kernels import softmax
from rope_lm.kernels.softmax import KERNELS
from rope_lm.positions import Positions, View, contiguous
from rope_lm.transformer import REMAT

SCALE = 0.3
every = pytest.mark.all


def inputs(length: int, dtype: str = "float32", rows: int = 1) -> tuple[jax.Array, ...]:
    """Return q, k, v, what is added to the logits, and a gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, (2, length, 3, 8)).astype(dtype) for key in keys[:4])
    return q, k, v[..., :6], jax.random.normal(keys[4], (rows, 3, length, length)), g[..., :6]


def of(kernel: str, view: View, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attend by a kernel, or by the definition, given what is added to the whole matrix of logits."""
    parts = softmax.parts(kernel, view)
    added = None if bias is None else [bias[:, :, queries, keys] for queries, keys in parts]
    return (softmax.plain if kernel == "plain" else KERNELS[kernel])(q, k, v, view, added, SCALE)


def values_and_gradients(kernel: str, view: View, given: tuple, g: jax.Array) -> list[jax.Array]:
    """Return the output and the gradient of everything given."""

    @jax.jit
    def run(given: tuple, g: jax.Array) -> list[jax.Array]:
        value, pull = jax.vjp(partial(of, kernel, view), *given)
        return [value, *jax.tree.leaves(pull(g))]

    return run(given, g)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [0, 1, pytest.param(2, marks=every)])
@pytest.mark.parametrize(
    "kernel, length",
    [
        ("blocked", 1),
        ("blocked", 65),
        ("blocked", 200),
        ("xla", 65),
        *(pytest.param("blocked", length, marks=every) for length in (63, 64, 1100)),
        *(pytest.param("xla", length, marks=every) for length in (1, 200)),
    ],
)
def test_a_kernel_is_attention(kernel, length, rows, causal):
    """`rows`: those of the bias, 0 for none."""
    q, k, v, bias, g = inputs(length, rows=max(rows, 1))
    given, at = (q, k, v, bias if rows else None), contiguous(length)
    found, expected = (values_and_gradients(name, View(at, at, causal), given, g) for name in (kernel, "plain"))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for ours, plain in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_the_definition_is_attention_written_out():
    q, k, v, bias, _ = inputs(5)
    at, expected = contiguous(5), np.zeros((2, 5, 3, 6))
    for row, head, i in np.ndindex(2, 3, 5):
        logits = [SCALE * np.dot(q[row, i, head], k[row, j, head]) + bias[0, head, i, j] for j in range(i + 1)]
        weights = np.exp(logits) / np.exp(logits).sum()
        expected[row, i, head] = sum(w * np.asarray(v[row, j, head]) for j, w in enumerate(weights))
    np.testing.assert_allclose(of("plain", View(at, at, True), q, k, v, bias), expected, atol=1e-5)


@pytest.mark.parametrize("kernel", ["blocked", "xla"])
def test_packed_rows_are_masked_by_every_kernel(kernel):
    q, k, v, bias, g = inputs(70)
    segment = jnp.array([[1] * 30 + [2] * 40, [1] * 60 + [0] * 10])
    index = jnp.array([[*range(30), *range(40)], [*range(60), *range(10)]])
    at = Positions(index, segment)
    found, expected = (values_and_gradients(name, View(at, at, True), (q, k, v, bias), g) for name in (kernel, "plain"))
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize("kernel", ["blocked", "xla"])
def test_logits_and_softmax_are_float32_under_bfloat16(kernel):
    q, k, v, bias, _ = inputs(128, "bfloat16")
    at = contiguous(128)
    view = View(at, at, True)
    exact = of("plain", view, *(x.astype(jnp.float32) for x in (q, k, v)), bias)
    out = jax.jit(partial(of, kernel, view))(q, k, v, bias)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=3e-2)


@pytest.mark.parametrize("biased", [True, pytest.param(False, marks=every)])
def test_gradients_under_bfloat16_are_near_the_exact_ones(biased):
    q, k, v, bias, g = inputs(200, "bfloat16")
    at, bias = contiguous(200), bias if biased else None
    view = View(at, at, True)
    found = values_and_gradients("blocked", view, (q, k, v, bias), g)
    exact = (*(x.astype(jnp.float32) for x in (q, k, v)), bias)
    expected = values_and_gradients("plain", view, exact, g.astype(jnp.float32))
    for ours, plain in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), plain, atol=1e-2 * max(float(jnp.abs(plain).max()), 1e-9))


def test_the_backward_pass_recomputes_logits_and_nothing_else():
    """Two products forward and five backward (arXiv 2205.14135, appendix B.2), inside a loop over layers too."""
    q, k, v, _, _ = inputs(64)
    at = contiguous(64)
    layer = REMAT["products"](partial(of, "blocked", View(at, at, True), bias=None))
    gradients = jax.grad(lambda *given: layer(*given).sum(), argnums=(0, 1, 2))
    assert str(jax.make_jaxpr(gradients)(q, k, v)).count("dot_general[") == 7


@pytest.mark.parametrize("rows, length", [(2, 64), (1, 63)])
def test_a_bias_that_cudnn_has_no_right_gradient_of_is_left_to_xla(rows, length):
    q, k, v, bias, _ = inputs(length, rows=rows)
    at = contiguous(length)
    runs = (jax.jit(partial(of, kernel, View(at, at, True))) for kernel in ("cudnn", "xla"))
    np.testing.assert_array_equal(*(run(q, k, v, bias) for run in runs))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("length, size", [(256, 64), (1024, 64), (512, 128)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_attention_in_values_and_gradients(length, size, biased, causal):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, (4, length, 2, size)).astype("bfloat16") for key in keys[:4])
    bias = jax.random.normal(keys[4], (1, 2, length, length)) if biased else None
    at = contiguous(length)
    view, wide = View(at, at, causal), [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        exact = values_and_gradients("plain", view, (*wide, bias), g.astype(jnp.float32))
    fused, dense = (values_and_gradients(kernel, view, (q, k, v, bias), g) for kernel in ("cudnn", "xla"))

    def off(x: jax.Array, y: jax.Array) -> float:
        return float(jnp.linalg.norm((x.astype(jnp.float32) - y).ravel()) / jnp.linalg.norm(y.ravel()))

    for ours, plain, wanted in zip(fused, dense, exact, strict=True):
        # cuDNN rounds a bias like everything else, and its gradient; `xla` keeps both in float32.
        assert off(ours, wanted) < max(2 * off(plain, wanted), 5e-3)
