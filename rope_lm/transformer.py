"""The model: a transformer whose encoding, attention and layers are each chosen by a section of the config."""

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm import attention as attentions
from rope_lm import positional, sharding
from rope_lm.block import RESIDUALS, Block, Linear, Style, Transform
from rope_lm.positions import Positions, contiguous
from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import bind


class Cache(NamedTuple):
    """Keys and values of the tokens so far, with their positions. Keys are turned where the encoding turns each alone;
    elsewhere they are raw, and the encoding is applied when they are read."""

    k: Float[Array, "L B S N H"]
    v: Float[Array, "L B S N H"]
    positions: Positions  # [B S]; segment 0 where nothing is stored yet
    used: Int[Array, ""]  # slots filled

    def forget(self, count: int) -> "Cache":
        """Without the oldest `count` tokens: their slots are free again, the others keep their positions."""
        older = lambda x, axis: jnp.roll(x, -count, axis)  # noqa: E731
        left = jnp.arange(self.k.shape[2]) < self.used - count
        positions = jax.tree.map(lambda each: older(each, 1) * left, self.positions)
        return Cache(older(self.k, 2), older(self.v, 2), positions, self.used - count)


def _keeping(names: tuple[str, ...]) -> Callable[[Callable], Callable]:
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return lambda body: jax.checkpoint(body, policy=policy, prevent_cse=False)


# What the forward pass of a layer in a loop keeps for the backward pass. Keeping the results of matrix products alone,
# and computing norms, GELU and the softmax again, is not only smaller (161 MB instead of 463) but faster, since less
# memory is written and read: 320 ms a step become 240 on two CPU cores (128 wide, 4 layers, length 256, batch 16).
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "products": _keeping(("product",)),
    "full": _keeping(()),
}


def in_full(function: Callable) -> Callable:
    """`function`, traced so that products of float32 numbers are computed in float32, forward and backward: a GPU would
    round them to TF32 first, which has 10 bits of fraction, and a TPU to bfloat16. It changes nothing on a CPU, nor for
    numbers in bfloat16."""

    @wraps(function)
    def traced(*given: Any, **named: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*given, **named)

    return traced


class Prepared(NamedTuple):
    """What an encoding makes of positions and its parameters alone: the same for all rows whose tokens stand alike."""

    bias: positional.Added | None  # of each part
    layers: Any  # [L ...] for `score`


class Drawn(nnx.Variable):
    """What attention draws at random, and nobody trains: [L F H]."""


class Transformer(nnx.Module):
    """Tokens to logits. The encoding acts in a line each: `embed`, `bias` and `prepare` before the layers, `score`,
    `rotate` and, where attention has features, `turn_features` in every layer.

    Inside, activations are [R D] with R = B * T rows: on the CPU every linear layer is then one plain matrix product.
    Where several devices share the rows, `placed` says how the stream lies over them. `written_out`: the layers are
    written one after another, instead of as a loop, and what the backward pass finds of them is what XLA likes.
    """

    placed = staticmethod(sharding.anywhere)
    written_out = False

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        position: Mapping[str, Any],
        tied: bool,
        embedding_scale: float,
        dtype: str,
        remat: str,
        attention: Mapping[str, Any],
        block: Mapping[str, Any],
        *,
        causal: bool,
        vocabulary: int,
        rngs: nnx.Rngs,
    ):
        """`causal`: whether a token sees no token after it. `rngs` has a stream `params`, one `position` for the
        encoding alone, so that every shared parameter of two arms starts bit-identical for the same seed, and one
        `features` for what attention draws. Raises Refusal for sizes that do not go together, and for an encoding and
        an attention that do not."""
        check(width, heads, layers, hidden, embedding_scale, dtype, remat)
        style = Style(**bind(Style, block, "model.block", {}))
        self.dtype = jnp.dtype(dtype)
        self.layers, self.heads, self.width = layers, heads, width
        self.embedding_scale, self.remat, self.causal = embedding_scale, remat, causal
        self.embedding = nnx.Param(
            embedding_scale * jax.random.normal(rngs.params(), (vocabulary, width)),
            axes=("vocabulary", "width"),
            decays=True,
        )
        shape = positional.Shape(width, heads, width // heads, layers, causal)
        self.position = positional.make(position, shape=shape, rngs=rngs)
        self.attention = attentions.make(attention)
        self.attention.check(position["name"], type(self.position))
        drawn = self.attention.draw(rngs.features(), layers, width // heads) if self.attention.redraw else None
        self.drawn = None if drawn is None else Drawn(drawn)

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, hidden, layers, style, self.dtype, rngs)

        self.blocks = stack(rngs)
        self.norm, self.norm_first = style.make_norm(width), RESIDUALS[style.residual].norm_first
        self.head = None if tied else Linear((width, vocabulary), ("width", "vocabulary"), 1.0, self.dtype, rngs)
        self.transform = Transform(width, vocabulary, style, self.dtype, rngs) if style.transform else None

    @in_full
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None = None,
        cache: Cache | None = None,
        prepared: Prepared | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Logits in float32, and the cache with these tokens added.

        Without `positions` the rows are contiguous pieces of text, and attention needs no mask. `prepared` is what
        `prepare` returns of the positions of the tokens and of all that they see; None where it is to be made here.
        """
        x, seen, kept = self.stream(tokens, positions, cache, self.attend, prepared)
        x = x if self.transform is None else self.transform(x)
        if self.head is None:
            # The table's rows have `embedding_scale` variance, a head's should have 1/D.
            x = x * (1 / (self.embedding_scale * math.sqrt(self.width)))
            logits = x @ self.embedding[...].astype(self.dtype).T
        else:
            logits = self.head(x)
        if self.transform is not None:
            logits = logits + self.transform.bias[...].astype(self.dtype)
        cache = None if cache is None else Cache(*kept, seen, cache.used + tokens.shape[1])
        return logits.astype(jnp.float32).reshape(*tokens.shape, -1), cache

    @in_full
    def stream(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None,
        cache: Cache | None,
        attend: Callable,
        prepared: Prepared | None = None,
    ) -> tuple[Float[Array, "R D"], Positions, Any]:
        """The stream after the last layer, where the keys stood, and what `attend` (as the method) kept of each
        layer; `prepared` as for a call."""
        batch, length = tokens.shape
        positions = contiguous(length) if positions is None else positions
        # Looked up and then rounded: what a token that is everywhere adds up to is summed in float32. In bfloat16 the
        # table's gradient was off by 4% over 2,048 bytes, by 41% over 4,096.
        x = self.embedding[...][tokens].astype(self.dtype)
        x = self.position.embed(x, positions).reshape(batch * length, self.width)
        x = self.norm(x) if self.norm_first else x
        seen = positions if cache is None else _append(cache, positions, batch)
        parts = self.attention.parts(positions, seen, self.causal)
        bias, each = self.prepare(positions, seen) if prepared is None else prepared
        graph, blocks = nnx.split(self.blocks)

        def body(x, layer):
            number, block, each, stored, drawn = layer
            rest = positions, seen, parts, bias, each, number, drawn, stored
            # Said of both ends of a layer: XLA would rather split the width, and keep all rows on every device.
            x, kept = nnx.merge(graph, block)(self.placed(x), batch, lambda q, k, v: attend(q, k, v, *rest))
            return self.placed(x), kept

        stored = None
        if cache is not None:
            stored = cache.k, cache.v, jnp.broadcast_to(cache.used, self.layers)
        drawn = None if self.drawn is None else self.drawn[...]
        layers = jnp.arange(self.layers), blocks, each, stored, drawn
        # Written out, a layer would be computed a second time only where XLA fails to see that it was computed before:
        # on one device rotary's step took 4 to 6% more so, since waves that leave the loop over pieces leave it twice.
        keeping, unroll = (REMAT["none"], self.layers) if self.written_out else (REMAT[self.remat], 1)
        x, kept = jax.lax.scan(keeping(body), x, layers, unroll=unroll)
        return x if self.norm_first else self.norm(x), seen, kept

    @in_full
    def prepare(self, q_positions: Positions, k_positions: Positions) -> Prepared:
        """What rows whose queries and keys stand so have in common."""
        # Of what the kernel works on alone.
        parts = self.attention.parts(q_positions, k_positions, self.causal)
        biases = [self.position.bias(q_positions[queries], k_positions[keys]) for queries, keys in parts]
        return Prepared(None if biases[0] is None else biases, self.position.prepare(q_positions, k_positions))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T N H"],
        v: Float[Array, "B T N E"],
        positions: Positions,
        seen: Positions,
        parts: positional.Parts,
        bias: positional.Added | None,
        prepared: Any,
        layer: Int[Array, ""],
        drawn: Float[Array, "F H"] | None,
        stored: tuple[Float[Array, "B S N H"], Float[Array, "B S N H"], Int[Array, ""]] | None,
    ) -> tuple[Float[Array, "B T N E"], tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]] | None]:
        """Attention of one layer, with what position does to it; and the keys and values that the queries saw, as they
        are cached, where some are `stored`."""
        # Once for each key, not each time that one is read: a token takes 0.9 ms, not 2.1 (scale tiny, two cores).
        alone = stored is not None and self.position.turned_alone
        if alone:
            q, k = self.position.rotate(q, k, positions, positions, layer)
        if stored is not None:
            past_k, past_v, used = stored
            k = jax.lax.dynamic_update_slice_in_dim(past_k, k.astype(past_k.dtype), used, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(past_v, v.astype(past_v.dtype), used, axis=1)
        score = self.position.score(q, k, positions, seen, prepared, parts)
        adding = [each for each in (bias, score) if each is not None]
        added = [sum(each) for each in zip(*adding, strict=True)] if adding else None
        turned_q, turned_k = (q, k) if alone else self.position.rotate(q, k, positions, seen, layer)
        turn = None
        if self.position.turns_features():
            turn = lambda q, k: self.position.turn_features(q, k, positions, seen, layer)  # noqa: E731
        attended = self.attention(turned_q, turned_k, v, positions, seen, added, turn, self.causal, drawn)
        return attended, None if stored is None else (k, v)

    def cache(self, batch: int, size: int) -> Cache:
        """An empty cache for `size` tokens of `batch` rows."""
        shape = (self.layers, batch, size, self.heads, self.width // self.heads)
        empty = lambda: jnp.zeros((batch, size), jnp.int32)  # noqa: E731 (an array of its own: a cache may be donated)
        keys, values = jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)
        return Cache(keys, values, Positions(empty(), empty()), jnp.int32(0))


def _append(cache: Cache, positions: Positions, batch: int) -> Positions:
    """The cache's positions with those of the new tokens in the next slots."""

    def append(old: Array, new: Array) -> Array:
        new = jnp.broadcast_to(new, (batch, new.shape[1]))
        return jax.lax.dynamic_update_slice_in_dim(old, new, cache.used, axis=1)

    old = cache.positions
    return Positions(append(old.index, positions.index), append(old.segment, positions.segment))


def check(width: int, heads: int, layers: int, hidden: int, embedding_scale: float, dtype: str, remat: str) -> None:
    """Raises Refusal for sizes that do not make a model."""
    for name, value in (("width", width), ("heads", heads), ("layers", layers), ("hidden", hidden)):
        if value < 1:
            raise Refusal(f"model.{name}={value}: must be at least 1")
    if width % heads:
        raise Refusal(
            f"model.width={width} is not divisible by model.heads={heads}: every head has width/heads components"
        )
    if not embedding_scale > 0:
        raise Refusal(f"model.embedding_scale={embedding_scale}: must be above 0 (the standard deviation at the start)")
    if dtype not in ("float32", "bfloat16"):
        raise Refusal(f"model.dtype={dtype!r}: must be float32 or bfloat16")
    if remat not in REMAT:
        raise unknown("model.remat", remat, REMAT)


def flops_per_token(
    width: int,
    heads: int,
    layers: int,
    hidden: int,
    position: Mapping[str, Any],
    attention: Mapping[str, Any],
    block: Mapping[str, Any],
    *,
    causal: bool,
    vocabulary: int,
    length: int,
) -> float:
    """Floating-point operations of training on one token: forward, and twice that backward.

    Two for each weight of a matrix product (the embedding is a look-up: it counts nothing), and for each product in
    attention over the keys that a token may see alone: of softmax attention that is causal, two products of `width`
    over (length + 1) / 2 keys on average; likewise an encoding's own products in every layer. Not counted: norms,
    softmax, sums over keys, what is computed again for the backward pass, and what an encoding makes of positions
    alone, once for all rows of a batch (below 1% at every scale in configs/presets.py).
    """
    style, shape = Style(**block), positional.Shape(width, heads, width // heads, layers, causal)
    weights = layers * style.weights(width, hidden) + style.transform * width * width + width * vocabulary
    encoding = positional.abstract(position, shape)
    attending = attentions.make(attention).flops(width, heads, length, causal, encoding.turns_features())
    return 3 * 2 * (weights + layers * (attending + encoding.flops(shape, length)))
