"""Encodings that act on the attention logits by position and content together."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rope_lm.kernels.products import einsum
from rope_lm.kernels.shift import by_distance, shifted, with_vectors
from rope_lm.kernels.sums import interpolated, onward
from rope_lm.positional.base import PositionalEncoding, Shape, parameter
from rope_lm.positional.rotary import above, angles, frequencies
from rope_lm.positions import Positions, View
from rope_lm.refusal import Refusal


class Shaw(PositionalEncoding):
    """Relative keys: q_i (k_j + a_(i-j)) / sqrt(H), with trained vectors a (arXiv 1803.02155, section 3.2, keys only).

    Each layer has one vector per distance up to `max_distance` tokens, shared across heads; all greater distances share
    the last. If tokens see what is ahead of them, distances to that side have vectors of their own. Initial values are
    normal with standard deviation `scale`.
    """

    def __init__(self, max_distance: int, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        if max_distance < 1:
            raise Refusal(f"model.position.max_distance={max_distance}: must be at least 1, in tokens")
        self.distances = range(max_distance, -1 if shape.causal else -max_distance - 1, -1)
        size = (shape.layers, len(self.distances), shape.head_size)
        table = scale * jax.random.normal(rngs.position(), size)  # from the nearest (or farthest ahead) distance on
        self.table = parameter(table, "layer", "distance", "component")

    def score(self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View) -> Float[Array, "B N T S"]:
        q = q.astype(jnp.float32) / math.sqrt(q.shape[-1])
        vectors = self.table[...][::-1].T
        return by_distance(q, jnp.broadcast_to(vectors, (q.shape[2], *vectors.shape)), self.distances, view)


class TransformerXL(PositionalEncoding):
    """Transformer-XL's logits: ((q_i + u) k_j + (q_i + v) W R_(i-j)) / sqrt(H) (arXiv 1901.02860, section 3.3).

    R are the sinusoids of a distance. Layers share u and v; each has its own W. W has initial values with variance 1/D;
    u and v are normal with standard deviation `scale`.
    """

    def __init__(self, base: float, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        if shape.width % 2:
            raise Refusal(f"transformer_xl pairs sines with cosines, model.width={shape.width} is odd: make it even")
        self.base = above("base", base, 1, "of the sinusoids, usually 10000")
        heads = (shape.heads, shape.head_size)
        draws = [
            jax.random.normal(rngs.position(), size) for size in (heads, heads, (shape.layers, *heads, shape.width))
        ]
        self.u = parameter(scale * draws[0], "heads", "component")
        self.v = parameter(scale * draws[1], "heads", "component")
        self.weight = parameter(draws[2] / math.sqrt(shape.width), "layer", "heads", "component", "width")

    def rotate(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
        return (q.astype(jnp.float32) + self.u[...]).astype(q.dtype), k

    def score(self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View) -> Float[Array, "B N T S"]:
        q = (q.astype(jnp.float32) + self.v[...]) / math.sqrt(q.shape[-1])
        frequency = frequencies(self.weight.shape[-1], self.base)
        if (distances := view.distances) is not None:
            angle = angles(jnp.asarray(distances), frequency)
            waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
            return shifted(with_vectors(q, einsum("nhd,rd->nhr", self.weight[...], waves)), view.k.length)
        # Any positions: sin(i - j) and cos(i - j) by the addition theorem, as one product over D.
        sine, cosine = jnp.split(einsum("btnh,nhd->btnd", q, self.weight[...]), 2, axis=-1)
        at_q, at_k = angles(view.q.index, frequency)[:, :, None], angles(view.k.index, frequency)
        turned = [sine * jnp.sin(at_q) + cosine * jnp.cos(at_q), cosine * jnp.sin(at_q) - sine * jnp.cos(at_q)]
        waves = jnp.concatenate([jnp.cos(at_k), jnp.sin(at_k)], -1)
        return einsum(
            "btnd,bsd->bnts", jnp.concatenate(turned, -1), jnp.broadcast_to(waves, (len(q), *waves.shape[1:]))
        )


class CoPE(PositionalEncoding):
    """Contextual positions (arXiv 2405.18719, section 4): a key's position is a sum of gates from it to the query.

    The gates are sigmoid(q k / sqrt(H)). The logit gains q e[p], interpolated between whole positions p; greater
    positions share the last of `positions`. Each layer has its own vectors e, shared across heads. Initial values are
    normal with standard deviation `scale` (0 in the paper).
    """

    looks_back = True  # gates are summed from a key forward to the query

    def __init__(self, positions: int, scale: float, *, shape: Shape, rngs: nnx.Rngs):
        if positions < 2:
            raise Refusal(f"model.position.positions={positions}: must be at least 2")
        size = (shape.layers, positions, shape.head_size)
        self.table = parameter(scale * jax.random.normal(rngs.position(), size), "layer", "position", "component")

    def score(self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View) -> Float[Array, "B N T S"]:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        vectors = self.table[...].T
        gates = jax.nn.sigmoid(einsum("btnh,bsnh->bnts", q / math.sqrt(q.shape[-1]), k)) * view.visible[:, None]
        by_position = with_vectors(q, jnp.broadcast_to(vectors, (q.shape[2], *vectors.shape)))
        return interpolated(by_position, jnp.minimum(onward(gates), vectors.shape[-1] - 1))


class Forgetting(PositionalEncoding):
    """The forget gate of FoX (arXiv 2503.02130, section 3): adds the log gates from after a key up to the query.

    A token's gate is sigmoid(w x + b), x its layer's input; each layer and head has its own w and b. Initial w are
    normal with variance 1/D, b starts at `gate_bias`: 5, as in x-transformers, forgets half in about 100 tokens.
    """

    looks_back = True  # gates are summed from a key forward to the query

    def __init__(self, gate_bias: float, *, shape: Shape, rngs: nnx.Rngs):
        weight = jax.random.normal(rngs.position(), (shape.layers, shape.width, shape.heads)) / math.sqrt(shape.width)
        self.weight = parameter(weight, "layer", "width", "heads")
        self.offset = parameter(jnp.full((shape.layers, shape.heads), gate_bias), "layer", "heads")

    def remember(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T N"]:
        return jax.nn.log_sigmoid(einsum("btd,dn->btn", x.astype(jnp.float32), self.weight[...]) + self.offset[...])

    def score(self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View) -> Float[Array, "B N T S"]:
        log_gates = view.k.memory.swapaxes(1, 2)[:, :, None] * view.visible[:, None]
        return onward(log_gates) - log_gates
