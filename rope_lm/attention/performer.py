"""Linear attention: the Performer's random features, whose cost grows with the length and not with its square."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rope_lm.attention.base import Attention, Turn
from rope_lm.positional import Added, PositionalEncoding, einsum
from rope_lm.positions import Positions, aligned, visible
from rope_lm.refusal import Refusal

LEAST = 1e-37  # of a denominator: a query that no key answers to gathers nothing


def orthonormal(rows: Float[Array, "N H H"]) -> Float[Array, "N H H"]:
    """Each row less its parts along the rows before it, at length 1: Gram and Schmidt's way, each part taken off twice
    (Giraud, Langou and Rozloznik 2005: twice is enough). It is QR's Q, transposed, where R's diagonal is positive: then
    all directions are equally likely (Mezzadri 2007, arXiv math-ph/0609050, section 5).

    Not by jnp.linalg.qr: on a CPU several of them at once wait for threads of the pool that they run on, and where
    every core is a device of its own a step waited for ever.
    """

    def straighten(i: Int[Array, ""], done: Array) -> Array:
        row, before = done[:, i], done * (jnp.arange(done.shape[1]) < i)[:, None]
        for _ in range(2):
            row = row - einsum("nj,njh->nh", einsum("njh,nh->nj", before, row), before)
        return done.at[:, i].set(row / jnp.linalg.norm(row, axis=-1, keepdims=True))

    return jax.lax.fori_loop(0, rows.shape[1], straighten, rows)


def projection(key: jax.Array, features: int, head_size: int) -> Float[Array, "F H"]:
    """Random directions: orthogonal within each `head_size` of them, with the lengths of Gaussian vectors (FAVOR+,
    arXiv 2009.14794, section 2.4)."""
    blocks = -(-features // head_size)
    turn, length = jax.random.split(key)
    squares = jax.random.normal(turn, (blocks, head_size, head_size)).swapaxes(1, 2)
    directions = orthonormal(squares).reshape(-1, head_size)[:features]
    norms = jnp.linalg.norm(jax.random.normal(length, (features, head_size)), axis=-1, keepdims=True)
    return directions * norms


def features(x: Float[Array, "B N T H"], drawn: Float[Array, "F H"]) -> Float[Array, "B N T F"]:
    """Logarithms of positive random features, in float32: phi(q) phi(k) is softmax's exp(q k / sqrt(H)) in expectation,
    up to a factor 1/F that cancels (arXiv 2009.14794, Lemma 1)."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    return x @ drawn.T - 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def masked_sums(
    q: Float[Array, "B N T F"], k: Float[Array, "B N S F"], v: Float[Array, "B N S E"], mask: Bool[Array, "#B 1 T S"]
) -> Float[Array, "B N T E"]:
    """Sum over the keys j that are seen of (q_i k_j) v_j, by way of the whole matrix: for packed and cached rows."""
    return (q @ k.swapaxes(2, 3) * mask) @ v


def causal_sums(
    q: Float[Array, "B N T F"], k: Float[Array, "B N T F"], v: Float[Array, "B N T E"], block: int
) -> Float[Array, "B N T E"]:
    """Sum over j <= i of (q_i k_j) v_j in time and memory linear in T: within blocks of queries by way of their matrix,
    before them by prefix sums of k v (arXiv 2009.14794, appendix B.1, in blocks)."""
    length = q.shape[2]

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -length % block), (0, 0)))
        return padded.reshape(*x.shape[:2], -1, block, x.shape[3])

    q, k, v = cut(q), cut(k), cut(v)
    sums = k.swapaxes(3, 4) @ v
    # Of earlier blocks alone: less the block's own, a sum over all would still know of it by its rounding.
    before = jnp.cumsum(jnp.pad(sums, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1], axis=2)
    out = jnp.tril(q @ k.swapaxes(3, 4)) @ v + q @ before
    return out.reshape(*out.shape[:2], -1, out.shape[4])[:, :, :length]


class Performer(Attention):
    """FAVOR+ (arXiv 2009.14794): softmax's kernel by positive orthogonal random features, shared by the heads of a
    layer.

    `features` for each head; they are drawn again every `redraw` steps, as a function of the seed and the number of the
    draw alone; `block`: tokens whose matrix is computed at once where attention is causal. What an encoding does to the
    features acts on the numerator, and the denominator stays as it is (RoFormer, arXiv 2104.09864, Eq. 19). There are
    no logits to add a bias to.
    """

    kernel = "prefix"

    def __init__(self, features: int, redraw: int, block: int):
        for name, value in (("features", features), ("redraw", redraw), ("block", block)):
            if value < 1:
                raise Refusal(f"model.attention.{name}={value}: must be at least 1")
        if features % 2:
            raise Refusal(f"model.attention.features={features}: must be even, so that they can be turned in pairs")
        self.features, self.redraw, self.block = features, redraw, block

    @classmethod
    def check(cls, name: str, encoding: type[PositionalEncoding]) -> None:
        if encoding.biased():
            raise Refusal(
                f"model.position.name={name} adds to the logits of attention, linear attention has none: choose "
                "attention=softmax, or an encoding that acts on embeddings, on queries and keys, or on features"
            )
        if encoding.relative_norms:
            raise Refusal(
                f"model.position.name={name} scales queries and keys by where the others are, random features know "
                "each alone: choose attention=softmax, or another encoding"
            )

    def draw(self, key: jax.Array, layers: int, head_size: int) -> Float[Array, "L F H"]:
        return jax.vmap(lambda each: projection(each, self.features, head_size))(jax.random.split(key, layers))

    def flops(self, width: int, heads: int, length: int, causal: bool, turned: bool) -> float:
        # Turned, the numerator's products are not the denominator's.
        within = ((1 + turned) * self.features * heads + width) * (self.block + 1) / 2 if causal else 0
        return 4 * width * self.features + within

    def floats(self, heads: int, length: int, causal: bool) -> float:
        return 8 * heads * self.features

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N E"],
        q_positions: Positions,
        k_positions: Positions,
        bias: Added | None,
        turn: Turn | None,
        causal: bool,
        drawn: Float[Array, "F H"] | None,
    ) -> Float[Array, "B T N E"]:
        # [B N T H] from here on: every product below is then a plain batched one.
        log_q, log_k = features(q.swapaxes(1, 2), drawn), features(k.swapaxes(1, 2), drawn)
        # A factor that all features of a query share cancels. One that all keys share would too, but what is ahead of a
        # query would then move its rounding; and there is no need, a key's features are at most exp(|w|^2 / 2).
        phi_q = jnp.exp(log_q - jax.lax.stop_gradient(log_q.max(-1, keepdims=True)))
        phi_k = jnp.exp(log_k)
        mask = None if aligned(q_positions, k_positions) else visible(q_positions, k_positions, causal)

        def sums(q: Array, k: Array, v: Array) -> Array:
            if mask is not None:
                return masked_sums(q, k, v, mask)
            return causal_sums(q, k, v, self.block) if causal else q @ (k.swapaxes(2, 3) @ v)

        values = v.swapaxes(1, 2).astype(jnp.float32)
        one = jnp.ones((*values.shape[:3], 1))
        if turn is None:
            both = sums(phi_q, phi_k, jnp.concatenate([values, one], axis=-1))
            numerator, denominator = both[..., :-1], both[..., -1:]
        else:
            turned = (x.swapaxes(1, 2) for x in turn(phi_q.swapaxes(1, 2), phi_k.swapaxes(1, 2)))
            numerator, denominator = sums(*turned, values), sums(phi_q, phi_k, one)
        # Both times a power of two, which rounds nothing: the gradient of a quotient squares the denominator.
        denominator = jnp.maximum(denominator, LEAST)
        scale = jax.lax.stop_gradient(jnp.exp2(-jnp.floor(jnp.log2(denominator))))
        out = (numerator * scale / (denominator * scale)).swapaxes(1, 2).astype(v.dtype)
        return checkpoint_name(out, "product")
