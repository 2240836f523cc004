"""Softmax attention: its scale and its names. Its kernels are tested in tests/kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_lm import attention
from rope_lm.positions import View, contiguous
from rope_lm.refusal import Refusal
from tests.models import model


def test_logits_are_scaled_by_the_models_head_size_whatever_the_size_of_queries():
    made = attention.make({"name": "softmax", "kernel": "xla"}, head_size=4)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    at = contiguous(6)
    found = made(q, k, v, View(at, at, causal=False), None, lambda q, k: (q, k), None)
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / 2, axis=-1)
    np.testing.assert_allclose(found, jnp.einsum("bnts,bsnh->btnh", weights, v), atol=1e-5)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(Refusal, match=r"unknown model\.attention\.kernel 'flsh'"):
        attention.make({"name": "softmax", "kernel": "flsh"}, head_size=8)


def test_an_encoding_that_turns_features_is_refused():
    with pytest.raises(
        Refusal, match="rotary_features turns the features of linear attention, softmax attention has none"
    ):
        model("rotary_features", attention={"name": "softmax", "kernel": "xla"})
