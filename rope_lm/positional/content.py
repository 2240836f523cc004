"""Encodings that act on the attention logits by way of what the tokens say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.positional.base import Added, Parts, PositionalEncoding, Shape, einsum
from rope_lm.positional.bias import distance, distances, shifted
from rope_lm.positional.rotary import above, angles, frequencies
from rope_lm.positions import Positions, visible
from rope_lm.refusal import Refusal


def seen(shape: Shape, length: int) -> float:
    """Keys that a token of a row may see, on average."""
    return (length + 1) / 2 if shape.causal else length


def of_queries(x: Float[Array, "B T N H"], parts: Parts) -> list[Float[Array, "B _ N H"]]:
    """Of the queries of each part: split, not sliced, since the gradient of a slice is a padded array."""
    return jnp.split(x, [queries.start for queries, _ in parts[1:]], axis=1)


def with_each(q: Float[Array, "B T N H"], vectors: Float[Array, "N H R"]) -> Float[Array, "B N T R"]:
    """The products of each query with each of its head's vectors: all rows in one, of which the vectors' gradient is
    one too."""
    batch, queries, heads, size = q.shape
    rows = q.transpose(2, 0, 1, 3).reshape(heads, batch * queries, size)
    return einsum("nxh,nhr->nxr", rows, vectors).reshape(heads, batch, queries, -1).swapaxes(0, 1)


def by_distance(
    q: Float[Array, "B T N H"],
    vectors: Float[Array, "N H R"],
    of: range,
    q_positions: Positions,
    k_positions: Positions,
    causal: bool,
    parts: Parts,
) -> Added:
    """q_i r_(i-j) of each part in rows that are whole pieces of text, r a vector for each distance in `of`, from the
    farthest on; beyond its ends all share the one at the end. If `causal`, keys ahead of their query are of no meaning.

    Each query is multiplied with each vector once, and what comes of it shifted to the key at that distance.
    """

    def some(q: Float[Array, "B T N H"], queries: slice, keys: slice) -> Float[Array, "B N T S"]:
        q_some, k_some = q_positions[queries], k_positions[keys]
        apart = distances(q_some, k_some, causal)
        begin = min(max(of[0] - apart[0], 0), len(of) - 1)
        end = max(begin + 1, min(of[0] - apart[-1] + 1, len(of)))
        products = with_each(q, vectors[..., begin:end])
        before = min(max(apart[0] - of[begin], 0), len(apart) - 1)
        after = len(apart) - before - (end - begin)
        many = lambda x, count: jnp.broadcast_to(x, (*x.shape[:-1], count))  # noqa: E731
        wide = jnp.concatenate([many(products[..., :1], before), products, many(products[..., -1:], after)], axis=-1)
        return shifted(wide, k_some.length)

    return [some(each, *part) for each, part in zip(of_queries(q, parts), parts, strict=True)]


class Shaw(PositionalEncoding):
    """Relative keys: q_i (k_j + a_(i-j)) / sqrt(H), a trained vector for each distance up to `max_distance` tokens, beyond
    which all share the last; of each layer, shared by its heads (arXiv 1803.02155, section 3.2, keys alone). Where
    tokens see what is ahead of them, distances to that side have vectors of their own.

    Initial values are normal with standard deviation `scale`.
    """

    def __init__(self, max_distance: int, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        if max_distance < 1:
            raise Refusal(f"model.position.max_distance={max_distance}: must be at least 1, in tokens")
        self.max_distance, self.ahead = max_distance, 0 if shape.causal else max_distance
        size = (shape.layers, self.ahead + 1 + max_distance, shape.head_size)
        self.table = nnx.Param(
            scale * jax.random.normal(rngs.position(), size), axes=("layer", "distance", "component"), decays=False
        )

    def prepare(self, q_positions: Positions, k_positions: Positions) -> Float[Array, "L P H"]:
        return self.table[...]

    def score(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        prepared: Float[Array, "P H"],
        parts: Parts,
    ) -> Added:
        q, table = q.astype(jnp.float32) / math.sqrt(q.shape[-1]), prepared
        if distances(q_positions, k_positions, self.ahead == 0) is not None:
            vectors = jnp.broadcast_to(table[::-1].T, (q.shape[2], *table.T.shape))
            of = range(self.max_distance, -self.ahead - 1, -1)
            return by_distance(q, vectors, of, q_positions, k_positions, self.ahead == 0, parts)
        away = jnp.clip(distance(q_positions, k_positions), -self.ahead, self.max_distance)
        # A product with one-hot rows: the gradient of a gather is a scatter, 10 times slower on the CPU.
        chosen = jax.nn.one_hot(self.ahead + away, len(table), dtype=jnp.float32)
        products = einsum("btnh,dh->btnd", q, table)
        return [einsum("btnd,btsd->bnts", products[:, i], chosen[:, i, j]) for i, j in parts]

    def flops(self, shape: Shape, length: int) -> float:
        return shape.width * (min(self.max_distance + 1, length) + min(self.ahead, length - 1))

    def floats(self, shape: Shape, rows: float, layers: int) -> float:
        return rows * shape.heads * layers / 2


class TransformerXL(PositionalEncoding):
    """Transformer-XL's logits: ((q_i + u) k_j + (q_i + v) W R_(i-j)) / sqrt(H), R the sinusoids of a distance, u and v
    shared by the layers, W of each layer (arXiv 1901.02860, section 3.3).

    W has initial values with variance 1/D; u and v are normal with standard deviation `scale`.
    """

    def __init__(self, base: float, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        if shape.width % 2:
            raise Refusal(f"transformer_xl pairs sines with cosines, model.width={shape.width} is odd: make it even")
        self.base, self.causal = above("base", base, 1, "that of the sinusoids, usually 10000"), shape.causal
        draw = lambda size: jax.random.normal(rngs.position(), size)  # noqa: E731
        heads = (shape.heads, shape.head_size)
        self.u = nnx.Param(scale * draw(heads), axes=("heads", "component"), decays=False)
        self.v = nnx.Param(scale * draw(heads), axes=("heads", "component"), decays=False)
        self.weight = nnx.Param(
            draw((shape.layers, *heads, shape.width)) / math.sqrt(shape.width),
            axes=("layer", "heads", "component", "width"),
            decays=False,
        )

    def _frequencies(self) -> np.ndarray:
        return frequencies(self.weight.shape[-1], self.base)

    def rotate(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        return (q.astype(jnp.float32) + self.u[...]).astype(q.dtype), k

    def prepare(self, q_positions: Positions, k_positions: Positions) -> Float[Array, "L N H _"]:
        """W R of each distance, if those between queries and keys are known; else W."""
        if (apart := distances(q_positions, k_positions, self.causal)) is None:
            return self.weight[...]
        angle = angles(jnp.asarray(apart), self._frequencies())
        return einsum("lnhd,rd->lnhr", self.weight[...], jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1))

    def score(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        prepared: Float[Array, "N H _"],
        parts: Parts,
    ) -> Added:
        q = (q.astype(jnp.float32) + self.v[...]) / math.sqrt(q.shape[-1])
        if (apart := distances(q_positions, k_positions, self.causal)) is not None:
            return by_distance(q, prepared, apart, q_positions, k_positions, self.causal, parts)
        # sin(i - j) and cos(i - j) by the addition theorem: for any positions a product over D.
        sine, cosine = jnp.split(einsum("btnh,nhd->btnd", q, prepared), 2, axis=-1)
        frequency = self._frequencies()
        at_q, at_k = angles(q_positions.index, frequency)[:, :, None], angles(k_positions.index, frequency)
        turned = [sine * jnp.sin(at_q) + cosine * jnp.cos(at_q), cosine * jnp.sin(at_q) - sine * jnp.cos(at_q)]
        turned, waves = jnp.concatenate(turned, -1), jnp.concatenate([jnp.cos(at_k), jnp.sin(at_k)], -1)
        waves = jnp.broadcast_to(waves, (len(q), *waves.shape[1:]))
        return [einsum("btnd,bsd->bnts", turned[:, queries], waves[:, keys]) for queries, keys in parts]

    def flops(self, shape: Shape, length: int) -> float:
        return shape.width * seen(shape, length)

    def held(self, shape: Shape, length: int) -> float:
        return shape.layers * shape.width * (length + 1 if shape.causal else 2 * length)

    def floats(self, shape: Shape, rows: float, layers: int) -> float:
        return rows * shape.heads * layers / 2


PIECE = 32  # keys whose sums are one product in `onward`


def onward(x: Float[Array, "*rows S"]) -> Float[Array, "*rows S"]:
    """The sum of each number and all that come after it, by products with triangles, within pieces and over them.

    XLA does not see that a cumulative sum in the backward pass is the one of the forward pass: it would compute anew
    what hangs on it.
    """
    rows, length = x.shape[:-1], x.shape[-1]
    if short := -length % PIECE:
        x = jnp.pad(x, [(0, 0)] * len(rows) + [(0, short)])
    pieces = x.reshape(*rows, -1, PIECE)
    within = einsum("...cs,sk->...ck", pieces, jnp.tri(PIECE))
    after = einsum("...c,ck->...k", within[..., 0], jnp.tri(pieces.shape[-2], k=-1))
    return (within + after[..., None]).reshape(x.shape)[..., :length]


def neighbours(x: Float[Array, "*rows P"], below: Int[Array, "*rows S"]) -> tuple[Array, Array]:
    """x[below] and x[below + 1] of each row, [*rows S] each."""
    return tuple(jnp.take_along_axis(x, each, axis=-1) for each in (below, below + 1))


def neighbours_in_pairs(x: Float[Array, "*rows P"], below: Int[Array, "*rows S"]) -> tuple[Array, Array]:
    """As `neighbours`, with one index for both in one complex number: on a CPU the gradient scatters one at a time."""
    pairs = jax.lax.complex(x[..., :-1], x[..., 1:])
    first = pairs.shape[-1] * jnp.arange(pairs.size // pairs.shape[-1]).reshape(*pairs.shape[:-1], 1)
    found = pairs.reshape(-1).at[(first + below).reshape(-1)].get(mode="promise_in_bounds").reshape(below.shape)
    return found.real, found.imag


def between(x: Float[Array, "*rows P"], at: Float[Array, "*rows S"]) -> Float[Array, "*rows S"]:
    """x at real positions from 0 to P - 1 of each row, interpolated between whole ones."""
    below = jnp.minimum(at.astype(jnp.int32), x.shape[-1] - 2)
    part = at - below
    left, right = jax.lax.platform_dependent(x, below, cpu=neighbours_in_pairs, default=neighbours)
    return left * (1 - part) + right * part


class CoPE(PositionalEncoding):
    """Contextual positions: a key's position is the sum of gates sigmoid(q k / sqrt(H)) from it to the query, and its
    logit q e[p], interpolated between whole p, the last of `positions` for all beyond (arXiv 2405.18719, section 4).

    The vectors e are of each layer, shared by its heads; initial values are normal with standard deviation `scale` (0
    in the paper).
    """

    backward = True  # gates are counted from a key forward to the query

    def __init__(self, positions: int, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        if positions < 2:
            raise Refusal(f"model.position.positions={positions}: must be at least 2")
        self.positions = positions
        size = (shape.layers, positions, shape.head_size)
        self.table = nnx.Param(
            scale * jax.random.normal(rngs.position(), size), axes=("layer", "position", "component"), decays=False
        )

    def prepare(self, q_positions: Positions, k_positions: Positions) -> Float[Array, "L P H"]:
        return self.table[...]

    def score(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        q_positions: Positions,
        k_positions: Positions,
        prepared: Float[Array, "P H"],
        parts: Parts,
    ) -> Added:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        table = jnp.broadcast_to(prepared.T, (q.shape[2], *prepared.T.shape))

        def some(q: Float[Array, "B T N H"], queries: slice, keys: slice) -> Float[Array, "B N T S"]:
            gates = jax.nn.sigmoid(einsum("btnh,bsnh->bnts", q / math.sqrt(q.shape[-1]), k[:, keys]))
            gates = gates * visible(q_positions[queries], k_positions[keys], causal=True)
            # Keys lie in the order of their positions, so those from a key to the query are those after it that are
            # seen, and no kernel leaves one of them out.
            return between(with_each(q, table), jnp.minimum(onward(gates), self.positions - 1))

        return [some(each, *part) for each, part in zip(of_queries(q, parts), parts, strict=True)]

    def flops(self, shape: Shape, length: int) -> float:
        return shape.width * (seen(shape, length) + self.positions)

    def floats(self, shape: Shape, rows: float, layers: int) -> float:
        return 5 * rows * shape.heads * layers
