"""Encodings that act on the attention logits by position alone."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rope_lm.kernels.products import einsum
from rope_lm.kernels.shift import shifted
from rope_lm.positional.base import PositionalEncoding, Shape, parameter
from rope_lm.positional.rotary import angles, frequencies
from rope_lm.positions import View
from rope_lm.refusal import Refusal


class DistanceBias(PositionalEncoding):
    """A bias that depends on the distance alone. A subclass defines `of_distance`."""

    def of_distance(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        """Return the bias of each distance, in tokens, for each head. Negative distances lie ahead of the query."""
        raise NotImplementedError

    def bias(self, view: View) -> Float[Array, "#B N T S"]:
        # T + S distances instead of T * S pairs, if the rows are contiguous.
        distances = View(view.q, view.k, causal=False).distances
        if distances is None:
            return jnp.moveaxis(self.of_distance(view.distance), -1, 1)
        by_distance = self.of_distance(jnp.asarray(distances)).T[None, :, None]
        rows = jnp.broadcast_to(by_distance, (*by_distance.shape[:2], view.q.length, by_distance.shape[3]))
        return shifted(rows, view.k.length)


def bucket(distance: Int[Array, "*S"], buckets: int, max_distance: int, causal: bool) -> Int[Array, "*S"]:
    """Return T5's bucket of a distance (arXiv 1910.10683, section 2.1, and its released code).

    Buckets are exact below buckets/2, then logarithmic up to `max_distance` tokens; all greater distances share the
    last. If `causal`, keys ahead of the query fall into bucket 0. Otherwise the first half of the buckets is for keys
    before the query and the second half for keys ahead.
    """
    side = jnp.zeros_like(distance)
    if causal:
        distance = jnp.maximum(distance, 0)
    else:
        buckets //= 2
        side = buckets * (distance < 0)
        distance = jnp.abs(distance)
    exact = buckets // 2
    share = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (share * (buckets - exact)).astype(jnp.int32)
    return side + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class RelativeBias(DistanceBias):
    """T5's trained scalar per head and bucket of distances, shared by all layers (arXiv 1910.10683, section 2.1).

    `buckets` (32 in T5); `max_distance`, from which all distances share the last bucket (128 tokens in T5). Initial
    values are normal with standard deviation `scale`.
    """

    def __init__(self, buckets: int, max_distance: int, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        least = 2 if shape.causal else 4  # two per side
        if buckets < least or max_distance <= buckets // 2:
            raise Refusal(
                f"model.position.buckets={buckets}, max_distance={max_distance}: needs buckets >= {least} and "
                "max_distance > buckets/2"
            )
        self.buckets, self.max_distance, self.causal = buckets, max_distance, shape.causal
        self.table = parameter(scale * jax.random.normal(rngs.position(), (buckets, shape.heads)), "bucket", "heads")

    def of_distance(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        # A product with one-hot rows, because the gradient of a look-up scatters into few places, one at a time.
        rows = jax.nn.one_hot(bucket(distance, self.buckets, self.max_distance, self.causal), self.buckets)
        return einsum("...k,kn->...n", rows, self.table[...])


def slopes(heads: int) -> np.ndarray:
    """Return ALiBi's slope of each head: 2 ** (-8 i / heads) (arXiv 2108.12409, section 3, and its released code).

    If `heads` is not a power of two: the slopes of the power below, filled up with every other one of the power above.
    """

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8 / count * np.arange(1, count + 1))

    power = 2 ** int(math.log2(heads))
    return np.concatenate([geometric(power), geometric(2 * power)[::2][: heads - power]])


class ALiBi(DistanceBias):
    """A bias that falls linearly with distance, at a fixed slope per head (arXiv 2108.12409, section 3).

    It is symmetric if tokens see what is ahead of them.
    """

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        self.heads = shape.heads

    def of_distance(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        return -jnp.asarray(slopes(self.heads), jnp.float32) * _magnitude(distance)


class KerpleLog(DistanceBias):
    """KERPLE, logarithmic: -r1 log(1 + r2 d), with trained r1, r2 > 0 per head (arXiv 2205.09921, section 4).

    All layers share them. As in its released code, r1 starts uniform in (0, 2), r2 in (0, 1), and both stay above 0.01.
    """

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        first, second = _uniform(rngs, (2, shape.heads))
        self.r1, self.r2 = parameter(2 * first, "heads"), parameter(second, "heads")

    def of_distance(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        r1, r2 = (_clipped(r[...], 0.01, math.inf) for r in (self.r1, self.r2))
        return -r1 * jnp.log1p(r2 * _magnitude(distance))


class KerplePower(DistanceBias):
    """KERPLE, power: -r1 d ** r2, with trained r1 > 0 and 0 < r2 <= 2 per head (arXiv 2205.09921, section 4).

    All layers share them. r1 starts uniform in (0, 1), r2 in (0, 2).
    """

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        first, second = _uniform(rngs, (2, shape.heads))
        self.r1, self.r2 = parameter(first, "heads"), parameter(2 * second, "heads")

    def of_distance(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        r1, r2 = _clipped(self.r1[...], 0.01, math.inf), _clipped(self.r2[...], 0.01, 2)
        magnitude = _magnitude(distance)
        # At distance 0 the power is 0, but its gradient through log 0 is not a number.
        power = jnp.exp(r2 * jnp.log(jnp.where(magnitude > 0, magnitude, 1.0)))
        return -r1 * jnp.where(magnitude > 0, power, 0.0)


class CurveBias(PositionalEncoding):
    """An MLP from one number per pair to a bias per head, shared by the layers. A subclass chooses the number.

    `hidden` units; initial values are uniform within 1 / sqrt(inputs), as in FIRE's code.
    """

    def __init__(self, hidden: int, *, shape: Shape, rngs: nnx.Rngs):
        if hidden < 1:
            raise Refusal(f"model.position.hidden={hidden}: must be at least 1")
        first, start = _uniform(rngs, (2, hidden))
        second, end = _uniform(rngs, (hidden, shape.heads)), _uniform(rngs, (shape.heads,))

        def spread(x: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
            return (2 * x - 1) / math.sqrt(inputs)

        self.first, self.start = parameter(spread(first, 1), "unit"), parameter(spread(start, 1), "unit")
        self.second = parameter(spread(second, hidden), "unit", "heads")
        self.end = parameter(spread(end, hidden), "heads")

    def curve(self, x: Float[Array, "*S"], activation: Callable[[Array], Array]) -> Float[Array, "N *S"]:
        """Return the bias of each number, heads first, because XLA transposes slowly on a CPU if few heads are last."""
        # The first layer is a product, because the gradient of a broadcast writes out both factors for all pairs.
        units = activation(einsum("u,s->us", self.first[...], x.reshape(-1)) + self.start[...][:, None])
        return (einsum("un,us->ns", self.second[...], units) + self.end[...][:, None]).reshape(-1, *x.shape)


class FIRE(CurveBias):
    """Functional interpolation: an MLP of log(1 + c d) / log(1 + c max(i, L)) (arXiv 2310.04418, section 3).

    d is the distance and i the query's index. `hidden` units (32 in the paper). The threshold L starts at `threshold`
    tokens and c at 0.1; both are trained. The longest distance maps to 1 at any length, so the bias changes when all
    positions are shifted.
    """

    looks_back = True  # a query's index is how far back it sees

    def __init__(self, hidden: int, threshold: float, *, shape: Shape, rngs: nnx.Rngs):
        super().__init__(hidden, shape=shape, rngs=rngs)
        if not threshold > 0:
            raise Refusal(f"model.position.threshold={threshold}: must be above 0, in tokens (512 in the paper)")
        self.threshold = threshold
        self.c = parameter(jnp.full((), 0.1))
        self.reach = parameter(jnp.ones(()))  # in multiples of `threshold`

    def bias(self, view: View) -> Float[Array, "#B N T S"]:
        def spread(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
            return jnp.log1p(jnp.abs(self.c[...] * x))

        longest = jnp.maximum(view.q.index.astype(jnp.float32), jnp.abs(self.threshold * self.reach[...]))
        share = spread(jnp.abs(view.distance).astype(jnp.float32)) / (spread(longest)[:, :, None] + 1e-6)
        return self.curve(share, jax.nn.relu).swapaxes(0, 1)


class ContinuousBias(CurveBias, DistanceBias):
    """Log-spaced continuous position bias: an MLP of sign(d) log(1 + |d|), d the distance (Swin V2, arXiv 2111.09883).

    Section 3.3 there, in one dimension, with SiLU and no bound on the bias, as in x-transformers' DynamicPositionBias.
    It accepts any distance, including ones that it was not trained on.
    """

    def of_distance(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        return jnp.moveaxis(self.curve(jnp.sign(distance) * jnp.log1p(jnp.abs(distance)), jax.nn.silu), 0, -1)


class Sandwich(DistanceBias):
    """The product of two sinusoids, as a bias (arXiv 2212.10356, section 4; `size` 128 there).

    It is the sum over i < size/2 of cos(d / 10000 ** (2 i / size)), divided by 8 h / heads in head h = 1, 2, ...
    """

    def __init__(self, size: int, *, shape: Shape, rngs: nnx.Rngs):
        if size < 2 or size % 2:
            raise Refusal(f"model.position.size={size}: must be an even number of at least 2 (128 in the paper)")
        self.size, self.heads = size, shape.heads

    def of_distance(self, distance: Int[Array, "*S"]) -> Float[Array, "*S N"]:
        waves = jnp.cos(angles(distance, frequencies(self.size, 10_000.0))).sum(-1)
        return waves[..., None] / (jnp.arange(1, self.heads + 1) * 8 / self.heads)


def _clipped(x: Float[Array, "N"], least: float, most: float) -> Float[Array, "N"]:
    """Clip x but keep its gradient, so that a parameter beyond a bound can come back."""
    return x + jax.lax.stop_gradient(jnp.clip(x, least, most) - x)


def _magnitude(distance: Int[Array, "*S"]) -> Float[Array, "*S 1"]:
    """Return the distance to either side, with an axis for heads."""
    return jnp.abs(distance).astype(jnp.float32)[..., None]


def _uniform(rngs: nnx.Rngs, size: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.uniform(rngs.position(), size)
