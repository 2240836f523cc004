"""The model: a transformer whose encoding, attention and layers are each chosen by a section of the config."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from rope_lm import attention as attentions
from rope_lm import positional
from rope_lm.block import RESIDUALS, Block, Linear, Style, Transform
from rope_lm.kernels.softmax import WHOLE, Added
from rope_lm.positional import PositionalEncoding, Shape
from rope_lm.positions import Positions, View, contiguous
from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import bind


class Cached(NamedTuple):
    """Keys, values and the encoding's memory of past tokens, for one layer, or [L ...] for all layers.

    Keys are cached after `rotate` if the encoding rotates each key by its own position alone and has no `score`, which
    would need them unrotated.
    """

    k: Float[Array, "*L B S N H"]
    v: Float[Array, "*L B S N E"]
    memory: Any  # a tree [*L B S ...]


class Cache(NamedTuple):
    """The tokens so far: their layers and positions, in S slots."""

    layers: Cached
    positions: Positions  # [B S]; segment 0 where a slot is free
    used: Int[Array, ""]  # slots filled


class Layer(NamedTuple):
    """One layer's slice of everything that has a layer axis: one element of the loop over layers."""

    block: nnx.State
    position: nnx.State
    drawn: Float[Array, "F H"] | None  # random numbers of attention
    cached: Cached | None


class Pass(NamedTuple):
    """Everything that the layers of one forward pass share."""

    view: View
    bias: Added | None
    used: Int[Array, ""] | None  # slots of the cache that were filled before
    weights: bool  # True to return attention weights


class Kept(NamedTuple):
    """The values that a layer returns besides the residual stream."""

    cached: Cached | None
    weights: Float[Array, "B N T S"] | None


@dataclass(frozen=True)
class Layout:
    """Platform-dependent choices in running the model. They change results by rounding only."""

    unroll: bool = False  # write the layers one after another instead of as a loop
    stream: NamedSharding | None = None  # of the residual stream [B*T D]; None where the compiler decides


PLAIN = Layout()


def _keeping(*names: str) -> Callable[[Callable], Callable]:
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return partial(jax.checkpoint, policy=policy, prevent_cse=False)


def _keeping_all(body: Callable) -> Callable:
    return body


# Values that a layer in a loop keeps for the backward pass. Recomputing norms, GELU and softmax takes less memory than
# keeping them, and less time on a CPU, because less is written and read.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": _keeping_all,
    "products": _keeping("product"),
    "full": _keeping(),
}


def full_precision(function: Callable) -> Callable:
    """Trace `function` so that float32 products, forward and backward, are computed in float32.

    By default a GPU rounds them to TF32 and a TPU to bfloat16.
    """

    @wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced


class Drawn(nnx.Variable):
    """The random numbers that attention uses, [L F H]. They are not trained."""


class Transformer(nnx.Module):
    """Tokens to logits.

    The encoding acts in `embed` and `bias` before the layers, and in `remember`, `rotate`, `score` and `turn_features`
    in every layer. Inside, activations are [R D] with R = B * T rows, so that every linear map is one matrix product.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_size: int | None,
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
        layout: Layout = PLAIN,
        rngs: nnx.Rngs,
    ):
        """Build the model that the section `model` of a config describes.

        `head_size`: components of a head; None for width / heads. `causal`: True if no token sees a token after it.
        `rngs` has three streams: `params`; `position` for the encoding alone, so that all other parameters start
        bit-identical whatever the encoding; and `features` for attention. Raises Refusal for values out of range, and
        for an encoding and an attention that do not fit together.
        """
        shape = check(width, heads, head_size, layers, causal)
        _check_numbers(hidden, embedding_scale, dtype, remat)
        style = Style(**bind(Style, block, "model.block", {}))
        self.dtype, self.remat, self.layout = jnp.dtype(dtype), remat, layout
        self.width, self.heads, self.head_size, self.layers, self.causal = shape
        self.embedding_scale = embedding_scale
        self.embedding = nnx.Param(
            embedding_scale * jax.random.normal(rngs.params(), (vocabulary, width)),
            axes=("vocabulary", "width"),
            decays=True,
        )
        self.position = positional.make(position, shape=shape, rngs=rngs)
        effects = positional.effects(position, shape)
        self.has_score = effects.score
        self.caches_turned = self.position.turns_alone and not effects.score
        self.rotated_size = effects.head_size
        self.attention = attentions.make(attention, head_size=shape.head_size)
        self.attention.check(position["name"], effects)
        drawn = self.attention.draw(rngs.features(), layers, effects.head_size)
        self.drawn = None if drawn is None else Drawn(drawn)

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(shape, hidden, style, self.dtype, rngs)

        self.blocks = stack(rngs)
        self.norm, self.norm_first = style.make_norm(width), RESIDUALS[style.residual].norm_first
        self.head = None if tied else Linear((width, vocabulary), ("width", "vocabulary"), 1.0, self.dtype, rngs)
        self.transform = Transform(width, vocabulary, style, self.dtype, rngs) if style.transform else None

    @full_precision
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None = None,
        cache: Cache | None = None,
        bias: Added | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Return logits in float32, and the cache with these tokens appended.

        Without `positions`, each row is one contiguous text from position 0. `bias`: the result of the method `bias`
        for this call's view; None to compute it here.
        """
        x, cache, _ = self._layers(tokens, positions, cache, bias)
        return self._logits(x).astype(jnp.float32).reshape(*tokens.shape, -1), cache

    @full_precision
    def weights(self, tokens: Int[Array, "B T"]) -> Float[Array, "L B N T T"]:
        """Return the attention weights of every layer, for rows that are each one contiguous text."""
        _, _, weights = self._layers(tokens, None, None, None, weights=True)
        assert weights is not None
        return weights

    @full_precision
    def bias(self, view: View) -> Added | None:
        """Return the encoding's bias for each part that attention computes. Rows with the same positions share it."""
        return _all_or_none([self.position.bias(view[part]) for part in self.attention.parts(view)])

    def _layers(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None,
        cache: Cache | None,
        bias: Added | None,
        weights: bool = False,
    ) -> tuple[Float[Array, "R D"], Cache | None, Float[Array, "L B N T S"] | None]:
        """Return the residual stream after the last layer, the cache with these tokens, and any attention weights."""
        batch, length = tokens.shape
        positions = contiguous(length) if positions is None else positions
        # Looked up and then rounded, so that the gradient of a frequent token is summed in float32.
        x = self.embedding[...][tokens].astype(self.dtype)
        x = self.position.embed(x, positions).reshape(batch * length, self.width)
        x = self.norm(x) if self.norm_first else x
        view = View(positions, positions if cache is None else _appended(cache, positions, batch), self.causal)
        bias = self.bias(view) if bias is None and not weights else bias
        shared = Pass(view, bias, None if cache is None else cache.used, weights)
        graph, blocks = nnx.split(self.blocks)
        position_graph, layered, rest = positional.split_layers(self.position)

        def body(x: Float[Array, "R D"], layer: Layer) -> tuple[Float[Array, "R D"], Kept]:
            block, position = nnx.merge(graph, layer.block), nnx.merge(position_graph, layer.position, rest)
            # Constrained at both ends of a layer: XLA would rather split the width and keep all rows everywhere.
            x, kept = block(self._placed(x), partial(self._attend, block, position, layer, shared))
            return self._placed(x), kept

        drawn = None if self.drawn is None else self.drawn[...]
        layers = Layer(blocks, layered, drawn, None if cache is None else cache.layers)
        # Unrolled layers keep what XLA likes. Only "full", which asks for little memory, stays a loop.
        remat, unroll = ("none", self.layers) if self.layout.unroll else (self.remat, 1)
        x, kept = jax.lax.scan(REMAT[remat](body), x, layers, unroll=unroll)
        if cache is not None:
            cache = Cache(kept.cached, view.k, cache.used + length)
        return x if self.norm_first else self.norm(x), cache, kept.weights

    def _attend(
        self, block: Block, position: PositionalEncoding, layer: Layer, shared: Pass, x: Float[Array, "R D"]
    ) -> tuple[Float[Array, "R _"], Kept]:
        """Return the output of one layer's attention for its input x, with every hook of the encoding applied."""
        q_positions, causal = shared.view.q, self.causal
        batch = len(x) // q_positions.length
        q, k, v = block.queries_keys_values(x, batch)
        memory = position.remember(x.reshape(batch, -1, self.width), q_positions)
        q_positions = replace(q_positions, memory=memory)
        view, cached = View(q_positions, q_positions, causal), None
        turned_q, turned_k = position.rotate(q, k, view)
        if layer.cached is not None and shared.used is not None:
            used = shared.used
            new = Cached(turned_k if self.caches_turned else k, v, memory)
            cached = jax.tree.map(lambda old, new: _append(old, new, used), layer.cached, new)
            k, v = cached.k, cached.v
            view = View(q_positions, replace(shared.view.k, memory=cached.memory), causal)
            turned_q, turned_k = (turned_q, k) if self.caches_turned else position.rotate(q, k, view)
        turn = partial(position.turn_features, view=view)
        if shared.weights:
            added = _sum(self._whole_bias(view), self._scores(position, q, k, view, [WHOLE]))
            weights = self.attention.weights(turned_q, turned_k, view, added, turn, layer.drawn)
            out = jnp.einsum("bnts,bsne->btne", weights.astype(v.dtype), v)
            return out.reshape(len(x), -1), Kept(cached, weights)
        added = _sum(shared.bias, self._scores(position, q, k, view, self.attention.parts(view)))
        out = self.attention(turned_q, turned_k, v, view, added, turn, layer.drawn)
        return out.reshape(len(x), -1), Kept(cached, None)

    def _scores(self, position: PositionalEncoding, q: Array, k: Array, view: View, parts: list) -> Added | None:
        """Return the encoding's `score` for each part. None if it has no score: then `k` may already be rotated."""
        if not self.has_score:
            return None
        # Queries are split, not sliced: the gradient of a split is one concatenation.
        queries = jnp.split(q, [part[0].start for part in parts[1:]], axis=1)
        pairs = zip(queries, parts, strict=True)
        return _all_or_none([position.score(some, k[:, part[1]], view[part]) for some, part in pairs])

    def _whole_bias(self, view: View) -> Added | None:
        bias = self.position.bias(view)
        return None if bias is None else [bias]

    def _placed(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        stream = self.layout.stream
        return x if stream is None else jax.lax.with_sharding_constraint(x, stream)

    def _logits(self, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
        x = x if self.transform is None else self.transform(x)
        if self.head is None:
            # The table's rows have variance `embedding_scale`^2; a head's weights should have 1/D.
            x = x * (1 / (self.embedding_scale * math.sqrt(self.width)))
            logits = x @ self.embedding[...].astype(self.dtype).T
        else:
            logits = self.head(x)
        return logits if self.transform is None else logits + self.transform.bias[...].astype(self.dtype)

    def cache(self, batch: int, size: int) -> Cache:
        """Return an empty cache for `size` tokens of `batch` rows."""

        def remember(x: Float[Array, "B 1 D"]) -> Any:
            return positional.at_layer(self.position, 0).remember(x, contiguous(1))

        def empty(*shape: int) -> Array:
            return jnp.zeros((self.layers, batch, size, *shape), self.dtype)

        one = jax.eval_shape(remember, jax.ShapeDtypeStruct((batch, 1, self.width), self.dtype))
        memory = jax.tree.map(lambda x: empty(*x.shape[2:]).astype(x.dtype), one)
        k = empty(self.heads, self.rotated_size if self.caches_turned else self.head_size)
        layers = Cached(k, empty(self.heads, self.head_size), memory)
        # Two arrays, because a cache may be donated.
        free = Positions(jnp.zeros((batch, size), jnp.int32), jnp.zeros((batch, size), jnp.int32))
        return Cache(layers, free, jnp.int32(0))


def _all_or_none(parts: list[Array | None]) -> Added | None:
    found = [part for part in parts if part is not None]
    return found or None


def _sum(bias: Added | None, scores: Added | None) -> Added | None:
    if bias is None or scores is None:
        return scores if bias is None else bias
    return [a + b for a, b in zip(bias, scores, strict=True)]


def _append(old: Array, new: Array, used: Int[Array, ""]) -> Array:
    """Return an array [B S ...] with the new tokens in the slots after the used ones."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), used, axis=1)


def _appended(cache: Cache, positions: Positions, batch: int) -> Positions:
    """Return the cache's positions with those of the new tokens in the next slots."""
    index, segment = (jnp.broadcast_to(x, (batch, positions.length)) for x in (positions.index, positions.segment))
    old = cache.positions
    return Positions(_append(old.index, index, cache.used), _append(old.segment, segment, cache.used))


def check(width: int, heads: int, head_size: int | None, layers: int, causal: bool) -> Shape:
    """Return the shape of a model. Raises Refusal for sizes that do not make one."""
    for name, value in (("width", width), ("heads", heads), ("head_size", head_size), ("layers", layers)):
        if value is not None and value < 1:
            raise Refusal(f"model.{name}={value}: must be at least 1")
    if head_size is None and width % heads:
        raise Refusal(
            f"model.width={width} is not divisible by model.heads={heads}: every head has width/heads components, "
            "unless model.head_size is set"
        )
    return Shape(width, heads, head_size or width // heads, layers, causal)


def _check_numbers(hidden: int, embedding_scale: float, dtype: str, remat: str) -> None:
    if hidden < 1:
        raise Refusal(f"model.hidden={hidden}: must be at least 1")
    if not embedding_scale > 0:
        raise Refusal(f"model.embedding_scale={embedding_scale}: must be above 0 (the standard deviation at the start)")
    if dtype not in ("float32", "bfloat16"):
        raise Refusal(f"model.dtype={dtype!r}: must be float32 or bfloat16")
    if remat not in REMAT:
        raise unknown("model.remat", remat, REMAT)
