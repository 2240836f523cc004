"""Linear attention: the Performer's random features, whose cost grows linearly with the length."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rope_lm.attention.base import Attention, Turn
from rope_lm.kernels.products import einsum
from rope_lm.kernels.softmax import Added
from rope_lm.positional import Effects
from rope_lm.positions import View
from rope_lm.refusal import Refusal

LEAST = 1e-37  # least denominator: a query that no key answers to gets an output of zero


def orthonormal(rows: Float[Array, "N H H"]) -> Float[Array, "N H H"]:
    """Orthogonalise each row against the rows before it (Gram-Schmidt), and normalise it.

    Each projection is removed twice, which suffices (Giraud, Langou and Rozloznik 2005). The result is QR's Q,
    transposed, with a positive diagonal of R, so all directions are equally likely (Mezzadri 2007, arXiv
    math-ph/0609050, section 5). `jnp.linalg.qr` is not used, because it can deadlock on a CPU: several calls at once
    wait for threads of the pool that they occupy themselves.
    """

    def straighten(i: Int[Array, ""], done: Float[Array, "N H H"]) -> Float[Array, "N H H"]:
        row, before = done[:, i], done * (jnp.arange(done.shape[1]) < i)[:, None]
        for _ in range(2):
            row = row - einsum("nj,njh->nh", einsum("njh,nh->nj", before, row), before)
        return done.at[:, i].set(row / jnp.linalg.norm(row, axis=-1, keepdims=True))

    return jax.lax.fori_loop(0, rows.shape[1], straighten, rows)


def projection(key: jax.Array, features: int, head_size: int) -> Float[Array, "F H"]:
    """Draw random directions: orthogonal in groups of `head_size`, with the lengths of Gaussian vectors.

    FAVOR+, arXiv 2009.14794, section 2.4.
    """
    blocks = -(-features // head_size)
    turn, length = jax.random.split(key)
    squares = jax.random.normal(turn, (blocks, head_size, head_size)).swapaxes(1, 2)
    directions = orthonormal(squares).reshape(-1, head_size)[:features]
    norms = jnp.linalg.norm(jax.random.normal(length, (features, head_size)), axis=-1, keepdims=True)
    return directions * norms


def log_features(x: Float[Array, "B N T H"], drawn: Float[Array, "F H"], head_size: int) -> Float[Array, "B N T F"]:
    """Return logarithms of positive random features, in float32 (arXiv 2009.14794, Lemma 1).

    phi(q) phi(k) is softmax's exp(q k / sqrt(head_size)) in expectation, up to a factor 1/F that cancels.
    """
    x = x.astype(jnp.float32) * head_size**-0.25
    return x @ drawn.T - 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def masked_sums(
    q: Float[Array, "B N T F"], k: Float[Array, "B N S F"], v: Float[Array, "B N S E"], mask: Bool[Array, "#B 1 T S"]
) -> Float[Array, "B N T E"]:
    """Return the sum over visible keys j of (q_i k_j) v_j, by the whole [T S] matrix, for packed and cached rows."""
    return (q @ k.swapaxes(2, 3) * mask) @ v


def causal_sums(
    q: Float[Array, "B N T F"], k: Float[Array, "B N T F"], v: Float[Array, "B N T E"], block: int
) -> Float[Array, "B N T E"]:
    """Return the sum over j <= i of (q_i k_j) v_j in time and memory linear in T.

    Keys in the query's own block are summed by the block's matrix, keys in earlier blocks by prefix sums of k v
    (arXiv 2009.14794, appendix B.1, in blocks).
    """
    length = q.shape[2]

    def cut(x: Float[Array, "B N T _"]) -> Float[Array, "B N _ _ _"]:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -length % block), (0, 0)))
        return padded.reshape(*x.shape[:2], -1, block, x.shape[3])

    q, k, v = cut(q), cut(k), cut(v)
    sums = k.swapaxes(3, 4) @ v
    # A sum over earlier blocks only: a total minus the block's own part would leak later tokens through its rounding.
    before = jnp.cumsum(jnp.pad(sums, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1], axis=2)
    out = jnp.tril(q @ k.swapaxes(3, 4)) @ v + q @ before
    return out.reshape(*out.shape[:2], -1, out.shape[4])[:, :, :length]


class Performer(Attention):
    """FAVOR+ (arXiv 2009.14794): softmax's kernel by positive orthogonal random features, shared by a layer's heads.

    `features`: per head, redrawn every `redraw` steps from the seed and the number of the draw. `block`: tokens per
    block of causal attention. An encoding may rotate the features in the numerator; the denominator is never rotated
    (RoFormer, arXiv 2104.09864, Eq. 19). An encoding cannot add to logits, because there are none.
    """

    def __init__(self, features: int, redraw: int, block: int, *, head_size: int):
        for name, value in (("features", features), ("redraw", redraw), ("block", block)):
            if value < 1:
                raise Refusal(f"model.attention.{name}={value}: must be at least 1")
        if features % 2:
            raise Refusal(f"model.attention.features={features}: must be even, so that they can be turned in pairs")
        self.features, self.redraw, self.block, self.head_size = features, redraw, block, head_size

    def check(self, name: str, effects: Effects) -> None:
        if effects.bias or effects.score:
            raise Refusal(
                f"model.position.name={name} adds to the logits of attention, linear attention has none: choose "
                "attention=softmax, or an encoding that acts on embeddings, on queries and keys, or on features"
            )
        if effects.relative_norms:
            raise Refusal(
                f"model.position.name={name} scales queries and keys by each other's positions, random features know "
                "each alone: choose attention=softmax, or another encoding"
            )

    def draw(self, key: jax.Array, layers: int, head_size: int) -> Float[Array, "L F H"]:
        return jax.vmap(partial(projection, features=self.features, head_size=head_size))(jax.random.split(key, layers))

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N E"],
        view: View,
        added: Added | None,
        turn: Turn,
        drawn: Float[Array, "F H"] | None,
    ) -> Float[Array, "B T N E"]:
        assert drawn is not None  # `draw` returns directions
        # [B N T H] from here on, so that every product below is one batched product.
        log_q, log_k = (log_features(x.swapaxes(1, 2), drawn, self.head_size) for x in (q, k))
        # A factor shared by all features of a query cancels. One shared by all keys would cancel too, but then keys
        # ahead of a query would change its rounding; without it, a key's features are at most exp(|w|^2 / 2).
        phi_q = jnp.exp(log_q - jax.lax.stop_gradient(log_q.max(-1, keepdims=True))).swapaxes(1, 2)
        phi_k = jnp.exp(log_k).swapaxes(1, 2)

        def sums(q: Array, k: Array, v: Array) -> Float[Array, "B N T _"]:
            q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
            if not view.aligned:
                return masked_sums(q, k, v, view.visible[:, None])
            return causal_sums(q, k, v, self.block) if view.causal else q @ (k.swapaxes(2, 3) @ v)

        values = v.swapaxes(1, 2).astype(jnp.float32)
        one = jnp.ones((*values.shape[:3], 1))
        turned_q, turned_k = turn(phi_q, phi_k)
        if turned_q is phi_q and turned_k is phi_k:
            both = sums(phi_q, phi_k, jnp.concatenate([values, one], axis=-1))
            numerator, denominator = both[..., :-1], both[..., -1:]
        else:
            numerator, denominator = sums(turned_q, turned_k, values), sums(phi_q, phi_k, one)
        # Scaled by a power of two, which rounds nothing, because the gradient of a quotient squares the denominator.
        denominator = jnp.maximum(denominator, LEAST)
        scale = jax.lax.stop_gradient(jnp.exp2(-jnp.floor(jnp.log2(denominator))))
        out = (numerator * scale / (denominator * scale)).swapaxes(1, 2).astype(v.dtype)
        return checkpoint_name(out, "product")

    def weights(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        view: View,
        added: Added | None,
        turn: Turn,
        drawn: Float[Array, "F H"] | None,
    ) -> Float[Array, "B N T S"]:
        # Attention is linear in its values, so one-hot values (the identity matrix) return the weights.
        batch, keys, heads, _ = k.shape
        values = jnp.broadcast_to(jnp.eye(keys)[None, :, None], (batch, keys, heads, keys))
        return self(q, k, values, view, added, turn, drawn).swapaxes(1, 2)
