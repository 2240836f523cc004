"""Sample from a model, one token at a time, with a cache of keys and values."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.plan import capacity
from rope_lm.positional import check_length
from rope_lm.positions import contiguous
from rope_lm.refusal import Refusal
from rope_lm.transformer import Cache, Transformer


def pick(
    logits: Float[Array, "V"], key: jax.Array, temperature: float | Float[Array, ""], top_p: float | Float[Array, ""]
) -> Int[Array, ""]:
    """Draw a token from softmax(logits / temperature); at temperature 0, return the likeliest.

    The token is drawn from the smallest set of likeliest tokens whose probabilities sum to at least `top_p` (nucleus
    sampling, arXiv 1904.09751, section 3.1).
    """
    order = jnp.argsort(-logits)
    sharp = logits[order] / jnp.maximum(temperature, 1e-6)
    likely = jax.nn.softmax(sharp)
    before = jnp.cumsum(likely) - likely  # the first token has nothing before it and always stays
    drawn = order[jax.random.categorical(key, jnp.where(before < top_p, sharp, -jnp.inf))]
    return jnp.where(temperature == 0, order[0], drawn)


def generate(
    model: Transformer, prompt: Sequence[int] | np.ndarray, count: int, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Yield `count` tokens that follow the prompt. Equal arguments give equal tokens.

    Raises Refusal for a prompt without a token, for settings out of range, for a model that is not causal, and if the
    encoding cannot encode so many positions.
    """
    if not len(prompt):
        raise Refusal("the prompt has no token: begin with the separator where there is no text")
    if count < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or not 0 <= seed < 2**32:
        raise Refusal(
            f"tokens={count}, temperature={temperature}, top_p={top_p}, seed={seed}: tokens must be at least 1, "
            "temperature at least 0, top_p above 0 and at most 1, and seed at least 0 and below 2**32"
        )
    if not model.causal:
        raise Refusal("this model sees the tokens ahead, so it cannot generate text: give a run of objective=causal")
    _check_memory(model, len(prompt) + count)
    check_length(model.position, len(prompt) + count - 1)  # the last token drawn is not read
    graph, state = nnx.split(model)

    @partial(jax.jit, donate_argnums=1)
    def read(
        state: nnx.State, cache: Cache, tokens: Int[Array, "1 T"], start: Int[Array, ""], key: jax.Array
    ) -> tuple[Int[Array, ""], Cache]:
        logits, cache = nnx.merge(graph, state)(tokens, contiguous(tokens.shape[1], start), cache)
        return pick(logits[0, -1], key, temperature, top_p), cache

    key, at = jax.random.key(seed), 0
    tokens, cache = jnp.asarray(prompt, jnp.int32)[None], model.cache(1, len(prompt) + count)
    for number in range(count):
        token, cache = read(state, cache, tokens, jnp.int32(at), jax.random.fold_in(key, number))
        at += tokens.shape[1]
        tokens = token[None, None]
        yield int(token)


def _check_memory(model: Transformer, tokens: int) -> None:
    """Raise Refusal if the cache of so many tokens does not fit in the memory of the device."""
    one, two = (jax.tree.leaves(model.cache(1, length)) for length in (1, 2))
    needs = tokens * sum(b.nbytes - a.nbytes for a, b in zip(one, two, strict=True))
    has = capacity(jax.devices()[0])
    if has and needs > has:
        raise Refusal(
            f"the keys and values of {tokens:,} tokens need {needs / 1e9:,.1f} GB, the device has {has / 1e9:.1f} GB: "
            "give fewer tokens"
        )
