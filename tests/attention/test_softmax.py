"""Kernels of softmax attention against its definition, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm import attention
from rope_lm.attention import softmax
from rope_lm.positions import contiguous
from rope_lm.refusal import Refusal


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
        added = None if bias is None else lambda queries, keys: bias[:, :, queries, keys]
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
        added = lambda queries, keys: bias[:, :, queries, keys]  # noqa: E731
        out = softmax.Softmax(kernel)(q, k, v, where, where, added, None, True, None)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=3e-2)


@pytest.mark.parametrize(
    "platform, dtype, biased, head_size, expected",
    [
        ("cpu", "float32", False, 64, "blocked"),
        ("cpu", "bfloat16", True, 64, "blocked"),
        ("cpu", "bfloat16", False, 20, "blocked"),
        ("gpu", "bfloat16", False, 64, "cudnn"),
        ("gpu", "bfloat16", False, 128, "cudnn"),
        ("gpu", "bfloat16", False, 136, "xla"),
        ("gpu", "bfloat16", False, 20, "xla"),
        ("gpu", "bfloat16", True, 64, "xla"),
        ("gpu", "float32", False, 64, "xla"),
        ("tpu", "bfloat16", False, 64, "xla"),
    ],
)
def test_one_kernel_for_each_platform_and_head_size(platform, dtype, biased, head_size, expected):
    section = attention.resolve({"name": "softmax", "kernel": "auto"}, platform, dtype, biased, head_size)
    assert section == {"name": "softmax", "kernel": expected}


def test_a_kernel_that_cannot_run_is_refused():
    with pytest.raises(Refusal, match=r"unknown model.attention.kernel 'flsh'"):
        softmax.choose("flsh", "cpu", "float32", False, 64)
    with pytest.raises(Refusal, match="not on cpu in float32: choose auto, xla or blocked"):
        softmax.choose("cudnn", "cpu", "float32", False, 64)
    with pytest.raises(Refusal, match="with a bias"):
        softmax.choose("cudnn", "gpu", "bfloat16", True, 64)
    for size in (20, 256):
        with pytest.raises(Refusal, match=f"kernel=cudnn takes heads .* model.width / model.heads = {size}: choose"):
            softmax.choose("cudnn", "gpu", "bfloat16", False, size)
