"""Encodings that act on the attention logits."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.positional.base import PositionalEncoding, Shape, einsum
from rope_lm.positional.rotary import angles, frequencies
from rope_lm.positions import Positions
from rope_lm.refusal import Refusal


def distance(q_positions: Positions, k_positions: Positions) -> Int[Array, "B T S"]:
    """Query index less key index, in tokens: how far back the key lies."""
    return q_positions.index[:, :, None] - k_positions.index[:, None, :]


def bucket(distance: Int[Array, "*S"], buckets: int, max_distance: int, causal: bool) -> Int[Array, "*S"]:
    """T5's bucket of a distance (arXiv 1910.10683, section 2.1, and its released code): exact below buckets/2, then
    logarithmic to `max_distance` tokens, beyond which all share the last. If `causal`, keys ahead of the query fall into
    bucket 0; else the first half of the buckets is for keys before the query and the second for those ahead."""
    side = 0
    if causal:
        distance = jnp.maximum(distance, 0)
    else:
        buckets //= 2
        side = buckets * (distance < 0)
        distance = jnp.abs(distance)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (far * (buckets - exact)).astype(jnp.int32)
    return side + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def shifted(x: Float[Array, "*B T R"], keys: int) -> Float[Array, "*B T S"]:
    """What queries have for each of R `distances`: for each of S keys instead (the relative shift of Transformer-XL,
    arXiv 1901.02860, appendix B). What it finds for keys that are nearer than the nearest distance is of no meaning."""
    *batch, queries, distances = x.shape
    # Every row begins one further on than the row before it: as rows that are one shorter.
    flat = x.reshape(*batch, queries * distances)[..., queries:]
    return flat.reshape(*batch, queries, distances - 1)[..., :keys]


def _shifted_back(keys: int, distances: int, g: Float[Array, "*B T S"]) -> tuple[Float[Array, "*B T R"]]:
    """The gradient, by what is copied in whole rows, and masked: XLA's own, which pads, finds the place of every number
    by a division, 3.3 ns where this takes 0.3 (one CPU core)."""
    *batch, queries, _ = g.shape
    # What fills up the rows is masked in the end. Zeros would be made padding again.
    if (short := distances - 1 - keys) > 0:
        g = jnp.concatenate([g, jnp.broadcast_to(g[..., :1], (*batch, queries, short))], -1)
    flat = g.reshape(*batch, queries * (distances - 1))
    before = jnp.broadcast_to(flat[..., :1], (*batch, queries))
    x = jnp.concatenate([before, flat], -1).reshape(*batch, queries, distances)
    key = jnp.arange(distances) - jnp.arange(queries, 0, -1)[:, None]
    return (jnp.where((key >= 0) & (key < keys), x, 0.0),)


shifted.defvjp(lambda x, keys: (shifted(x, keys), x.shape[-1]), _shifted_back)


def distances(q_positions: Positions, k_positions: Positions, causal: bool) -> range | None:
    """Those between queries and keys, as `shifted` takes them, from one beyond the farthest on; None where rows are not
    known to be whole pieces of text. If `causal`, those to keys ahead of every query are left out, but for as many as
    `shifted` needs to find all keys."""
    if q_positions.start is None or k_positions.start is None:
        return None
    queries, keys = q_positions.length, k_positions.length
    beyond = q_positions.start + queries - k_positions.start
    count = min(max(beyond + 1, keys + 1), queries + keys) if causal else queries + keys
    return range(beyond, beyond - count, -1)


class DistanceBias(PositionalEncoding):
    """A bias that hangs on the distance alone: a subclass says how."""

    def of(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        """The bias of each distance, in tokens; negative is ahead of the query."""
        raise NotImplementedError

    def bias(self, q_positions: Positions, k_positions: Positions) -> Float[Array, "#B N T S"]:
        apart = distances(q_positions, k_positions, causal=False)
        if apart is None:
            return jnp.moveaxis(self.of(distance(q_positions, k_positions)), -1, 1)
        # Of T + S distances instead of T * S pairs: an MLP of whole rows then took 7% of a step instead of 24
        # (continuous_bias; two CPU cores, 128 wide, 4 layers, length 256, batch 16).
        each = self.of(jnp.asarray(apart)).T[None, :, None]
        each = jnp.broadcast_to(each, (*each.shape[:2], q_positions.length, each.shape[3]))
        return shifted(each, k_positions.length)


class RelativeBias(DistanceBias):
    """T5's trained scalar per head and bucket of distances, shared by all layers (arXiv 1910.10683, section 2.1).

    `buckets` (32 in T5) and `max_distance`, the distance in tokens from which all share the last bucket (128 in T5).
    Initial values are normal with standard deviation `scale`.
    """

    def __init__(self, buckets: int, max_distance: int, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        least = 2 if shape.causal else 4  # two for each side
        if buckets < least or max_distance <= buckets // 2:
            raise Refusal(
                f"model.position.buckets={buckets}, max_distance={max_distance}: needs buckets >= {least} and max_distance > "
                "buckets/2"
            )
        self.buckets, self.causal = buckets, shape.causal
        self.max_distance = max_distance
        self.table = nnx.Param(
            scale * jax.random.normal(rngs.position(), (buckets, shape.heads)), axes=("bucket", "heads"), decays=False
        )

    def of(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        # A product with one-hot rows: the gradient of a look-up is a scatter into few places, where an accelerator's
        # threads wait for one another.
        rows = jax.nn.one_hot(bucket(distance, self.buckets, self.max_distance, self.causal), self.buckets)
        return einsum("...k,kn->...n", rows, self.table[...])


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head: 2 ** (-8 i / heads), and where heads is no power of two those of the power below,
    filled up with every other one of the power above (arXiv 2108.12409, section 3, and its released code)."""
    power = 2 ** int(math.log2(heads))
    geometric = lambda count: 2.0 ** (-8 / count * np.arange(1, count + 1))  # noqa: E731
    return np.concatenate([geometric(power), geometric(2 * power)[::2][: heads - power]])


class ALiBi(DistanceBias):
    """A bias that falls linearly with distance, at a fixed slope for each head (arXiv 2108.12409, section 3); to both
    sides alike where tokens see what is ahead of them."""

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        self.heads = shape.heads

    def of(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        return -jnp.asarray(slopes(self.heads), jnp.float32) * _away(distance)


class KerpleLog(DistanceBias):
    """KERPLE, logarithmic: -r1 log(1 + r2 d), r1, r2 > 0 trained for each head and shared by the layers (arXiv
    2205.09921, section 4). As in its released code, r1 starts uniform in (0, 2), r2 in (0, 1), and both are kept above
    0.01."""

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        first, second = _uniform(rngs, (2, shape.heads))
        self.r1 = nnx.Param(2 * first, axes=("heads",), decays=False)
        self.r2 = nnx.Param(second, axes=("heads",), decays=False)

    def of(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        r1, r2 = (_held(r[...], 0.01, jnp.inf) for r in (self.r1, self.r2))
        return -r1 * jnp.log1p(r2 * _away(distance))


class KerplePower(DistanceBias):
    """KERPLE, power: -r1 d ** r2, r1 > 0 and 0 < r2 <= 2 trained for each head and shared by the layers (arXiv
    2205.09921, section 4). r1 starts uniform in (0, 1), r2 in (0, 2)."""

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        first, second = _uniform(rngs, (2, shape.heads))
        self.r1 = nnx.Param(first, axes=("heads",), decays=False)
        self.r2 = nnx.Param(2 * second, axes=("heads",), decays=False)

    def of(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        r1, r2 = (_held(r[...], 0.01, most) for r, most in ((self.r1, jnp.inf), (self.r2, 2)))
        away = _away(distance)
        # At distance 0 the power is 0 and its gradient, through log 0, is not a number.
        power = jnp.exp(r2 * jnp.log(jnp.where(away > 0, away, 1.0)))
        return -r1 * jnp.where(away > 0, power, 0.0)


class CurveBias(PositionalEncoding):
    """An MLP of one number to a bias for each head, shared by the layers: of what number, a subclass says.

    `hidden` units; initial values are uniform within 1 / sqrt(inputs), as in FIRE's code.
    """

    def __init__(self, hidden: int, *, shape: Shape, rngs: nnx.Rngs):
        if hidden < 1:
            raise Refusal(f"model.position.hidden={hidden}: must be at least 1")
        first, start = _uniform(rngs, (2, hidden))
        second, end = _uniform(rngs, (hidden, shape.heads)), _uniform(rngs, (shape.heads,))
        spread = lambda x, inputs: (2 * x - 1) / math.sqrt(inputs)  # noqa: E731
        self.first = nnx.Param(spread(first, 1), axes=("unit",), decays=False)
        self.start = nnx.Param(spread(start, 1), axes=("unit",), decays=False)
        self.second = nnx.Param(spread(second, hidden), axes=("unit", "heads"), decays=False)
        self.end = nnx.Param(spread(end, hidden), axes=("heads",), decays=False)

    def curve(self, x: Float[Array, "*S"], activation: Callable[[Array], Array]) -> Float[Array, "N *S"]:
        """The bias of each number, heads first: with few heads last, XLA on a CPU turns matrices of all pairs around,
        three times as long as the products take."""
        # As a product, whose gradients are products: those of a broadcast write both factors out for all pairs.
        units = activation(einsum("u,s->us", self.first[...], x.reshape(-1)) + self.start[...][:, None])
        return (einsum("un,us->ns", self.second[...], units) + self.end[...][:, None]).reshape(-1, *x.shape)


class FIRE(CurveBias):
    """Functional interpolation: an MLP of log(1 + c d) / log(1 + c max(i, L)), d the distance and i the query's index,
    to a bias for each head, shared by the layers (arXiv 2310.04418, section 3).

    `hidden` units (32 in the paper); the threshold L starts at `threshold` tokens and c at 0.1. Dividing by what the
    query could see makes the longest distance 1 at any length, and so the bias not invariant to shifts.
    """

    backward = True  # a query's index says how far back it sees, and nothing of what is ahead

    def __init__(self, hidden: int, threshold: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(hidden, shape=shape, rngs=rngs)
        if not threshold > 0:
            raise Refusal(f"model.position.threshold={threshold}: must be above 0, in tokens (512 in the paper)")
        self.threshold = threshold
        self.c = nnx.Param(jnp.full((), 0.1), axes=(), decays=False)
        self.reach = nnx.Param(jnp.ones(()), axes=(), decays=False)  # times `threshold`

    def bias(self, q_positions: Positions, k_positions: Positions) -> Float[Array, "#B N T S"]:
        spread = lambda x: jnp.log1p(jnp.abs(self.c[...] * x))  # noqa: E731
        most = jnp.maximum(q_positions.index.astype(jnp.float32), jnp.abs(self.threshold * self.reach[...]))
        share = spread(_away(distance(q_positions, k_positions))[..., 0]) / (spread(most)[:, :, None] + 1e-6)
        return self.curve(share, jax.nn.relu).swapaxes(0, 1)

    def floats(self, shape: Shape, rows: float, layers: int) -> float:
        return self.first.shape[0] + shape.heads  # units of every pair: it does not hang on the distance alone


class ContinuousBias(CurveBias, DistanceBias):
    """Log-spaced continuous position bias: an MLP of sign(d) log(1 + |d|), d the distance, to a bias for each head,
    shared by the layers (Swin V2, arXiv 2111.09883, section 3.3, in one dimension; SiLU and no bound on the bias, as in
    x-transformers' DynamicPositionBias). It takes any distance, also one that it was not trained on."""

    def of(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        return jnp.moveaxis(self.curve(jnp.sign(distance) * jnp.log1p(jnp.abs(distance)), jax.nn.silu), 0, -1)


class Sandwich(DistanceBias):
    """The product of two sinusoids, as a bias: sum over i < size/2 of cos(d / 10000 ** (2 i / size)), divided by
    8 h / heads in head h = 1, 2, ... (arXiv 2212.10356, section 4; size 128 there)."""

    def __init__(self, size: int, *, shape: Shape, rngs: nnx.Rngs):
        if size < 2 or size % 2:
            raise Refusal(f"model.position.size={size}: must be an even number of at least 2 (128 in the paper)")
        self.size, self.heads = size, shape.heads

    def of(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        waves = jnp.cos(angles(distance, frequencies(self.size, 10_000.0))).sum(-1)
        return waves[..., None] / (jnp.arange(1, self.heads + 1) * 8 / self.heads)


def _held(x: Float[Array, "N"], least: float, most: float) -> Float[Array, "N"]:
    """x within bounds, with the gradient of x: a parameter beyond a bound can come back, as where its data is clamped
    after each update."""
    return x + jax.lax.stop_gradient(jnp.clip(x, least, most) - x)


def _away(distance: Int[Array, "*S"]) -> Float[Array, "*S 1"]:
    """How far a key is to either side, for each head."""
    return jnp.abs(distance).astype(jnp.float32)[..., None]


def _uniform(rngs: nnx.Rngs, size: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.uniform(rngs.position(), size)
