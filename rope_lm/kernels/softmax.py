"""Softmax attention over some parts of the matrix of logits, one kernel per platform.

All compute softmax(q k * scale + added) v. `added`: biases and scores that the encoding adds to the logits, one array
[#B N t s] in float32 for each of `parts`, or None. Dimensions: B batch, T query length, S key length, N heads, H head
size, E value size.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rope_lm.kernels.products import einsum, repeated
from rope_lm.positions import Part, View

HIDDEN = -1e30  # logit of a masked pair; finite, so that a row without any visible key stays finite
WHOLE: Part = (slice(None), slice(None))
Added = list[Float[Array, "#B N _ _"]]


def weights(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View, added: Added | None, scale: float
) -> Float[Array, "B N T S"]:
    """Return the attention weights, computed over the whole matrix at once: the definition that kernels must match."""
    logits = _product("btnh,bsnh->bnts", q, k) * scale
    logits = logits if added is None else logits + added[0]
    return jax.nn.softmax(jnp.where(view.visible[:, None], logits, HIDDEN), axis=-1)


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    view: View,
    added: Added | None,
    scale: float,
) -> Float[Array, "B T N E"]:
    """Attend with `weights`: the plain definition of every kernel."""
    return _product("bnts,bsne->btne", weights(q, k, view, added, scale).astype(v.dtype), v).astype(v.dtype)


def xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    view: View,
    added: Added | None,
    scale: float,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> Float[Array, "B T N E"]:
    """Attend over the whole matrix through `jax.nn.dot_product_attention`; logits and softmax in float32."""
    size = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - size)))  # JAX wants values as wide as queries
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=None if added is None else added[0],
        mask=None if view.aligned else view.visible[:, None],
        is_causal=view.causal and view.aligned,
        scale=scale,
        implementation=implementation,
    )
    return checkpoint_name(out[..., :size], "product")


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    view: View,
    added: Added | None,
    scale: float,
) -> Float[Array, "B T N E"]:
    """Attend with cuDNN's fused kernel, on NVIDIA GPUs in half precision. A bias and its gradient are rounded to it.

    The kernel takes one bias for all rows (the gradient of several has open bugs upstream), and none at odd lengths.
    Calls that do not fit, including decoding with a bias, use `xla`.
    """
    if added is None:
        return xla(q, k, v, view, None, scale, "cudnn")
    if added[0].shape[0] > 1 or q.shape[1] % 2 or k.shape[1] % 2:
        return xla(q, k, v, view, added, scale)
    return xla(q, k, v, view, [added[0].astype(q.dtype)], scale, "cudnn")


def blocks(length: int, causal: bool) -> list[Part]:
    """Return the parts that `blocked` computes: at most 16 blocks of queries, so that compile time stays bounded."""
    size = max(64, -(-length // 16))
    edges = [*range(0, length, size), length]
    return [(slice(start, stop), slice(0, stop if causal else length)) for start, stop in pairwise(edges)]


def blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    view: View,
    added: Added | None,
    scale: float,
) -> Float[Array, "B T N E"]:
    """Attend in blocks of queries. If causal, a block skips the keys after it, which `xla` computes and then masks.

    Rows that need a mask use `xla`.
    """
    if not view.aligned:
        return xla(q, k, v, view, added, scale)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B N T H], so that every block is one batched product
    q = q * jnp.asarray(scale, q.dtype)
    if added is not None:
        # In memory, because XLA would recompute it beside every exponential, one number at a time.
        added = [repeated(x[0], len(q)) if x.shape[0] == 1 else x for x in jax.lax.optimization_barrier(added)]
    return _blocked(q, k, v, added, view.causal).swapaxes(1, 2)


_product = partial(einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T E"],
    added: Added | None,
    causal: bool,
) -> Float[Array, "B N T E"]:
    """Compute softmax(q k + added) v with FlashAttention's backward pass, which is faster than autodiff with a bias."""
    return _attend(q, k, v, added, causal)[0]


def _attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T E"],
    added: Added | None,
    causal: bool,
) -> tuple[Float[Array, "B N T E"], Float[Array, "B N T"]]:
    """Return attention's output, and the logarithm of each query's sum of exponentials."""
    outputs, log_sums = [], []
    for number, (_, keys) in enumerate(blocks(q.shape[2], causal)):
        logits = _logits(q, k, added, causal, number)
        top = logits.max(-1, keepdims=True)
        exponentials = jnp.exp(logits - top)
        total = exponentials.sum(-1, keepdims=True)
        # Normalised after the product with the values, because [T E] is smaller than [T S].
        outputs.append(_product("bnts,bnse->bnte", exponentials.astype(v.dtype), v[:, :, keys]) / total)
        log_sums.append((top + jnp.log(total)).squeeze(-1))
    return jnp.concatenate(outputs, axis=2).astype(q.dtype), jnp.concatenate(log_sums, axis=2)


def _logits(
    q: Float[Array, "B N T H"], k: Float[Array, "B N T H"], added: Added | None, causal: bool, number: int
) -> Float[Array, "B N _ _"]:
    """Return the logits of one block."""
    queries, keys = blocks(q.shape[2], causal)[number]
    logits = _product("bnth,bnsh->bnts", q[:, :, queries], k[:, :, keys])
    if added is not None:
        logits = logits + added[number]
    if not causal:
        return logits
    ahead = jnp.arange(keys.stop)[None, :] > jnp.arange(queries.start, queries.stop)[:, None]
    return logits + jnp.where(ahead, HIDDEN, 0.0)  # added, because a selection would end XLA's fusion


class Residuals(NamedTuple):
    """Values kept for the backward pass of `_blocked`."""

    q: Float[Array, "B N T H"]
    k: Float[Array, "B N T H"]
    v: Float[Array, "B N T E"]
    added: Added | None
    output: Float[Array, "B N T E"]
    log_sums: Float[Array, "B N T"]


def _blocked_forward(
    q: Array, k: Array, v: Array, added: Added | None, causal: bool
) -> tuple[Float[Array, "B N T E"], Residuals]:
    output, log_sums = (checkpoint_name(x, "product") for x in _attend(q, k, v, added, causal))
    return output, Residuals(q, k, v, added, output, log_sums)


def _blocked_backward(
    causal: bool, kept: Residuals, g: Float[Array, "B N T E"]
) -> tuple[Array, Array, Array, Added | None]:
    """Recompute the weights from `log_sums`, and differentiate (FlashAttention, arXiv 2205.14135, appendix B.2)."""
    q, k, v = kept.q, kept.k, kept.v
    common = jnp.sum(g.astype(jnp.float32) * kept.output.astype(jnp.float32), -1)
    dq, dk, dv, d_added = list[Array](), list[Array](), list[Array](), list[Array]()
    for number, (queries, keys) in enumerate(blocks(q.shape[2], causal)):
        probabilities = jnp.exp(_logits(q, k, kept.added, causal, number) - kept.log_sums[:, :, queries, None])
        d_probabilities = _product("bnte,bnse->bnts", g[:, :, queries], v[:, :, keys])
        d_logits = probabilities * (d_probabilities - common[:, :, queries, None])
        d_added.append(d_logits)
        d_logits = d_logits.astype(q.dtype)
        dq.append(_product("bnts,bnsh->bnth", d_logits, k[:, :, keys]))
        dk.append(_product("bnts,bnth->bnsh", d_logits, q[:, :, queries]))
        dv.append(_product("bnts,bnte->bnse", probabilities.astype(v.dtype), g[:, :, queries]))
    all_dq, all_dk, all_dv = jnp.concatenate(dq, axis=2), _summed(dk), _summed(dv)
    gradients = all_dq.astype(q.dtype), all_dk.astype(k.dtype), all_dv.astype(v.dtype)
    return *gradients, None if kept.added is None else d_added


def _summed(parts: list[Float[Array, "B N _ H"]]) -> Float[Array, "B N T H"]:
    """Sum the blocks' gradients of the keys without padding them. Each covers all keys, or the first few."""
    ends = sorted({x.shape[2] for x in parts})
    pieces = [jnp.split(x, [end for end in ends if end < x.shape[2]], axis=2) for x in parts]
    return jnp.concatenate([sum(x[i] for x in pieces if i < len(x)) for i in range(len(ends))], axis=2)


_blocked.defvjp(_blocked_forward, _blocked_backward)

Kernel = Callable[
    [
        Float[Array, "B T N H"],
        Float[Array, "B S N H"],
        Float[Array, "B S N E"],
        View,
        Added | None,
        float,
    ],
    Float[Array, "B T N E"],
]
KERNELS: dict[str, Kernel] = {"xla": xla, "cudnn": cudnn, "blocked": blocked}


def parts(kernel: str, view: View) -> list[Part]:
    """Return the parts of the matrix of logits that a kernel computes one at a time."""
    return blocks(view.q.length, view.causal) if kernel == "blocked" and view.aligned else [WHOLE]
