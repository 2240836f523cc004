"""Kernels of softmax attention against its definition, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm import attention, positional
from rope_lm.attention import softmax
from rope_lm.positions import contiguous
from rope_lm.refusal import Refusal
from rope_lm.transformer import REMAT


def reference(q, k, v, bias, causal=True):
    """softmax(q k^T / sqrt(H) + bias) v over the keys up to each query, or over all, written out."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    logits = logits + (0 if bias is None else bias)
    seen = np.tril(np.ones(logits.shape[-2:], bool)) | (not causal)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1), v)


def inputs(length: int, dtype: str = "float32"):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, (2, length, 3, 8)).astype(dtype) for key in keys[:4])
    return q, k, v, jax.random.normal(keys[4], (1, 3, length, length)), g


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1100])
@pytest.mark.parametrize("kernel", ["blocked", "xla"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_is_attention(kernel, length, biased, causal):
    q, k, v, bias, g = inputs(length)
    bias = bias if biased else None
    where = contiguous(length)

    def ours(q, k, v, bias):
        parts = attend.parts(where, where, causal)
        added = None if bias is None else [bias[:, :, queries, keys] for queries, keys in parts]
        return attend(q, k, v, where, where, added, None, causal, None)

    attend = softmax.Softmax(kernel)
    value, pull = jax.vjp(jax.jit(ours), q, k, v, bias)
    expected, pull_reference = jax.vjp(jax.jit(partial(reference, causal=causal)), q, k, v, bias)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for got, wanted in zip(jax.tree.leaves(pull(g)), jax.tree.leaves(pull_reference(g)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_logits_and_softmax_are_float32_under_bfloat16():
    q, k, v, bias, _ = inputs(128, "bfloat16")
    where = contiguous(128)
    exact = reference(*(x.astype(jnp.float32) for x in (q, k, v)), bias)
    for kernel in ("blocked", "xla"):
        attend = softmax.Softmax(kernel)
        added = [bias[:, :, queries, keys] for queries, keys in attend.parts(where, where, True)]
        out = attend(q, k, v, where, where, added, None, True, None)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=3e-2)


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_under_bfloat16_are_near_the_exact_ones(biased):
    q, k, v, bias, g = inputs(200, "bfloat16")
    where, attend = contiguous(200), softmax.Softmax("blocked")
    parts = attend.parts(where, where, True)

    def ours(q, k, v, bias):
        added = [bias[:, :, queries, keys] for queries, keys in parts] if biased else None
        return attend(q, k, v, where, where, added, None, True, None)

    found = jax.vjp(jax.jit(ours), q, k, v, bias)[1](g)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    wanted = jax.vjp(lambda q, k, v, b: reference(q, k, v, b if biased else None), *exact, bias)[1]
    for ours, exact in zip(found, wanted(g.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=1e-2 * max(float(jnp.abs(exact).max()), 1e-9))


def test_the_backward_pass_makes_logits_anew_and_nothing_else():
    """Two products forward and five backward (arXiv 2205.14135, appendix B.2), where the layer is a loop's."""
    q, k, v, _, _ = inputs(64)
    where, attend = contiguous(64), softmax.Softmax("blocked")
    layer = REMAT["products"](lambda q, k, v: attend(q, k, v, where, where, None, None, True, None))
    gradients = jax.grad(lambda *given: layer(*given).sum(), argnums=(0, 1, 2))
    assert str(jax.make_jaxpr(gradients)(q, k, v)).count("dot_general[") == 7


@pytest.mark.parametrize(
    "platform, dtype, encoding, head_size, expected",
    [
        ("cpu", "float32", "none", 64, "blocked"),
        ("cpu", "bfloat16", "fire", 64, "blocked"),
        ("cpu", "bfloat16", "none", 20, "blocked"),
        ("gpu", "bfloat16", "rotary", 64, "cudnn"),
        ("gpu", "bfloat16", "none", 128, "cudnn"),
        ("gpu", "bfloat16", "none", 136, "xla"),
        ("gpu", "bfloat16", "none", 20, "xla"),
        ("gpu", "bfloat16", "alibi", 64, "cudnn"),
        ("gpu", "bfloat16", "shaw", 64, "xla"),
        ("gpu", "float32", "none", 64, "xla"),
        ("tpu", "bfloat16", "none", 64, "xla"),
    ],
)
def test_one_kernel_for_each_platform_encoding_and_head_size(platform, dtype, encoding, head_size, expected):
    chosen = {"name": "softmax", "kernel": "auto"}
    encoding = positional.ENCODINGS[encoding]
    section = attention.resolve(chosen, platform, dtype, encoding, head_size)
    assert section == {"name": "softmax", "kernel": expected}


@pytest.mark.parametrize("name, members, taken", [
    ("rotary", 2, True),
    ("alibi", 1, True),
    ("alibi", 2, False),  # members on devices of their own have one each
    ("shaw", 1, False),  # it hangs on content: every row has its own
])  # fmt: skip
def test_cudnn_takes_one_bias_for_all_rows(name, members, taken):
    def resolve(kernel: str) -> str:
        asked = {"name": "softmax", "kernel": kernel}
        return attention.resolve(asked, "gpu", "bfloat16", positional.ENCODINGS[name], 64, members)["kernel"]

    assert resolve("auto") == ("cudnn" if taken else "xla")
    if not taken:
        with pytest.raises(
            Refusal, match="one bias to the logits of all rows, not on gpu in bfloat16 with many: choose"
        ):
            resolve("cudnn")


@pytest.mark.parametrize(
    "kernel, name, in_turn", [("cudnn", "alibi", True), ("cudnn", "rotary", False), ("xla", "alibi", False)]
)
def test_members_take_turns_where_the_kernel_takes_one_bias(kernel, name, in_turn):
    assert softmax.Softmax(kernel).in_turn(positional.ENCODINGS[name]) == in_turn


@pytest.mark.parametrize("rows, length", [(2, 64), (1, 63)])
def test_flash_leaves_what_cudnn_has_no_right_gradient_of_to_xla(rows, length):
    q, k, v, bias, _ = inputs(length)
    bias = jnp.repeat(bias, rows, 0)
    found = [kernel(q, k, v, [bias], None, True) for kernel in (softmax.flash, softmax.dense)]
    np.testing.assert_array_equal(*found)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("length, size", [(256, 64), (1024, 64), (512, 128)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_is_attention_values_and_gradients(length, size, biased, causal):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, (4, length, 2, size)).astype("bfloat16") for key in keys[:4])
    bias = jax.random.normal(keys[4], (1, 2, length, length)) if biased else None

    def through(kernel, q, k, v, bias):
        return kernel(q, k, v, None if bias is None else [bias], None, causal)

    def of(function, *given):
        value, pull = jax.vjp(jax.jit(function), *given, bias)
        return [value, *jax.tree.leaves(pull(g.astype(value.dtype)))]

    with jax.default_matmul_precision("highest"):
        exact = of(partial(reference, causal=causal), *(x.astype(jnp.float32) for x in (q, k, v)))
    off = lambda x, y: jnp.linalg.norm((x.astype(jnp.float32) - y).ravel()) / jnp.linalg.norm(y.ravel())  # noqa: E731
    found = [of(partial(through, kernel), q, k, v) for kernel in (softmax.flash, softmax.dense)]
    for ours, plain, wanted in zip(*found, exact, strict=True):
        # A bias is rounded like all else: its gradient too, which `dense` has in float32.
        assert off(ours, wanted) < max(2 * off(plain, wanted), 5e-3)


def test_a_kernel_that_cannot_run_is_refused():
    with pytest.raises(Refusal, match=r"unknown model.attention.kernel 'flsh'"):
        softmax.choose("flsh", "cpu", "float32", "nothing", 64)
    with pytest.raises(Refusal, match="not on cpu in float32: choose auto, xla or blocked"):
        softmax.choose("cudnn", "cpu", "float32", "nothing", 64)
    with pytest.raises(Refusal, match="one bias to the logits of all rows, not on gpu in bfloat16 with many: choose"):
        softmax.choose("cudnn", "gpu", "bfloat16", "many", 64)
    for size in (20, 256):
        with pytest.raises(Refusal, match=f"kernel=cudnn takes heads .* model.width / model.heads = {size}: choose"):
            softmax.choose("cudnn", "gpu", "bfloat16", "nothing", size)
