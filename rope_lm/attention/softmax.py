"""Softmax attention and its kernels: one per platform, chosen here and nowhere else."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from rope_lm.attention.base import Attention, Turn
from rope_lm.positional import Added, Parts, PositionalEncoding, einsum, for_rows
from rope_lm.positions import Positions, aligned, visible
from rope_lm.refusal import Refusal, unknown

HIDDEN = -1e30  # a logit that no softmax sees; finite, so that a row without any visible key stays finite
Kernel = Callable[..., Float[Array, "B T N E"]]


def dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    bias: Added | None,
    mask: Bool[Array, "#B 1 T S"] | None,
    causal: bool,
) -> Float[Array, "B T N E"]:
    """Attention over the whole matrix of logits, through XLA; logits and softmax in float32.

    `causal` may be set instead of a mask where the rows are contiguous and T = S.
    """
    added = None if bias is None else bias[0]
    out = jax.nn.dot_product_attention(q, k, v, bias=added, mask=mask, is_causal=causal, implementation="xla")
    return checkpoint_name(out, "product")


def flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    bias: Added | None,
    mask: Bool[Array, "#B 1 T S"] | None,
    causal: bool,
) -> Float[Array, "B T N E"]:
    """cuDNN's fused attention: half precision on NVIDIA GPUs, to which a bias is rounded, and its gradient.

    GPT-2 small with T5's bias takes 87 ms a step on an H200 where `dense` takes 142. It takes one bias for all rows (of
    others the gradient has open bugs upstream) and has none for odd lengths: the rest, decoding too, goes to `dense`.
    """
    added = None if bias is None else bias[0]
    if added is not None and (added.shape[0] > 1 or q.shape[1] % 2 or k.shape[1] % 2):
        return dense(q, k, v, bias, mask, causal)
    added = None if added is None else added.astype(q.dtype)
    out = jax.nn.dot_product_attention(q, k, v, bias=added, mask=mask, is_causal=causal, implementation="cudnn")
    return checkpoint_name(out, "product")


def block_size(length: int) -> int:
    """Queries of a block of `blocked`: there are at most 16, so that compile time does not grow with the length."""
    return max(64, -(-length // 16))


def blocks(length: int, causal: bool) -> Parts:
    """Queries and keys of each block of `blocked`."""
    edges = [*range(0, length, block_size(length)), length]
    return [(slice(start, stop), slice(0, stop if causal else length)) for start, stop in pairwise(edges)]


def blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    bias: Added | None,
    mask: Bool[Array, "#B 1 T S"] | None,
    causal: bool,
) -> Float[Array, "B T N E"]:
    """Attention of contiguous rows over blocks of queries that, if causal, compute only the keys before them.

    Half of a causal matrix of logits is computed for nothing by `dense`. On two CPU cores at length 256 the blocks take
    15 ms forward and backward where it takes 43. Rows that need a mask go to `dense`.
    """
    if mask is not None:
        return dense(q, k, v, bias, mask, causal)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B N T H]: every block below is then a plain batched product
    q = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    if bias is not None:
        # In memory: XLA would compute it anew beside every exponential, one number at a time (T5's: 18% of a step).
        bias = [for_rows(x[0], len(q)) if x.shape[0] == 1 else x for x in jax.lax.optimization_barrier(bias)]
    return _blocked(q, k, v, bias, causal).swapaxes(1, 2)


_product = partial(einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T E"],
    bias: Added | None,
    causal: bool,
) -> Float[Array, "B N T E"]:
    """softmax(q k + bias) v, with a backward pass of its own: 2% of a step less than with JAX's, and with a bias 4%."""
    return _gathered(q, k, v, bias, causal)[0]


def _gathered(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T E"],
    bias: Added | None,
    causal: bool,
) -> tuple[Float[Array, "B N T E"], Float[Array, "B N T"]]:
    """What the queries gather, and the logarithm of the sum of each one's exponentials."""
    gathered, log_sums = [], []
    for number, (_, keys) in enumerate(blocks(q.shape[2], causal)):
        logits = _logits(q, k, bias, causal, number)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        # Normalising after the product with the values divides [T H] numbers instead of [T S].
        gathered.append(_product("bnts,bnsh->bnth", weights.astype(v.dtype), v[:, :, keys]) / total)
        log_sums.append((top + jnp.log(total)).squeeze(-1))
    return jnp.concatenate(gathered, axis=2).astype(q.dtype), jnp.concatenate(log_sums, axis=2)


def _logits(
    q: Float[Array, "B N T H"], k: Float[Array, "B N T H"], bias: Added | None, causal: bool, number: int
) -> Float[Array, "B N _ _"]:
    """Of one block."""
    queries, keys = blocks(q.shape[2], causal)[number]
    logits = _product("bnth,bnsh->bnts", q[:, :, queries], k[:, :, keys])
    if bias is not None:
        logits = logits + bias[number]
    if not causal:
        return logits
    ahead = jnp.arange(keys.stop)[None, :] > jnp.arange(queries.start, queries.stop)[:, None]
    # Added, where a selection would end XLA's fusion: a layer then takes 17 ms, forward and backward, not 22.
    return logits + jnp.where(ahead, HIDDEN, 0.0)


def _forward(q: Array, k: Array, v: Array, bias: Added | None, causal: bool) -> tuple[Array, tuple]:
    gathered, log_sums = _gathered(q, k, v, bias, causal)
    gathered, log_sums = checkpoint_name(gathered, "product"), checkpoint_name(log_sums, "product")
    return gathered, (q, k, v, bias, gathered, log_sums)


def _backward(causal: bool, kept: tuple, g: Float[Array, "B N T E"]) -> tuple[Array, Array, Array, Added | None]:
    """That of FlashAttention (arXiv 2205.14135, appendix B.2): weights are made anew from the sums that were kept, and
    what the gradients of a query's logits have in common is the product of `g` and what the query gathered."""
    q, k, v, bias, gathered, log_sums = kept
    common = jnp.sum(g.astype(jnp.float32) * gathered.astype(jnp.float32), -1)
    of_q, of_k, of_v, of_bias = [], [], [], []
    for number, (queries, keys) in enumerate(blocks(q.shape[2], causal)):
        weights = jnp.exp(_logits(q, k, bias, causal, number) - log_sums[:, :, queries, None])
        of_weights = _product("bnth,bnsh->bnts", g[:, :, queries], v[:, :, keys])
        of_logits = weights * (of_weights - common[:, :, queries, None])
        of_bias.append(of_logits)
        of_logits = of_logits.astype(q.dtype)
        of_q.append(_product("bnts,bnsh->bnth", of_logits, k[:, :, keys]))
        of_k.append(_product("bnts,bnth->bnsh", of_logits, q[:, :, queries]))
        of_v.append(_product("bnts,bnth->bnsh", weights.astype(v.dtype), g[:, :, queries]))
    of_q = jnp.concatenate(of_q, axis=2).astype(q.dtype)
    of_k, of_v = _over_blocks(of_k).astype(k.dtype), _over_blocks(of_v).astype(v.dtype)
    return of_q, of_k, of_v, None if bias is None else of_bias


def _over_blocks(of_keys: list[Float[Array, "B N _ H"]]) -> Float[Array, "B N T H"]:
    """The sum of what each block has for the keys that it saw: all, or the first ones, in pieces that end where a
    block's do."""
    ends = sorted({x.shape[2] for x in of_keys})
    pieces = [jnp.split(x, [end for end in ends if end < x.shape[2]], axis=2) for x in of_keys]
    return jnp.concatenate([sum(x[i] for x in pieces if i < len(x)) for i in range(len(ends))], axis=2)


_blocked.defvjp(_forward, _backward)


KERNELS: dict[str, Kernel] = {"xla": dense, "cudnn": flash, "blocked": blocked}


def choose(kernel: str, platform: str, dtype: str, added: str, head_size: int) -> str:
    """The name in KERNELS that `kernel` stands for; "auto" is the fastest one for the platform, the dtype and what is
    `added` to the logits ("nothing", "one" for all rows, "many").

    `platform` as JAX names it: "gpu", its name for ROCm too, is taken for NVIDIA's, so an AMD GPU needs kernel=xla.
    Raises Refusal for an unknown name and for a kernel that cannot run there.
    """
    # What every GPU's cuDNN takes; from compute capability 9.0 on it takes heads of up to 256.
    sized = head_size % 8 == 0 and head_size <= 128
    fused = platform == "gpu" and dtype == "bfloat16" and added != "many"
    if kernel == "auto":
        return "cudnn" if fused and sized else "blocked" if platform == "cpu" else "xla"
    if kernel not in KERNELS:
        raise unknown("model.attention.kernel", kernel, ["auto", *KERNELS])
    if kernel == "cudnn" and not fused:
        raise Refusal(
            "model.attention.kernel=cudnn runs on NVIDIA GPUs in bfloat16 and adds one bias to the logits of all rows, "
            f"not on {platform} in {dtype}{' with many' if added == 'many' else ''}: choose auto, xla or blocked"
        )
    if kernel == "cudnn" and not sized:
        raise Refusal(
            f"model.attention.kernel=cudnn takes heads whose size is a multiple of 8 and at most 128, here "
            f"model.width / model.heads = {head_size}: choose auto or xla, or other heads"
        )
    return kernel


class Softmax(Attention):
    """softmax(q k / sqrt(H) + bias) v (arXiv 1706.03762, section 3.2.1), computed by one of KERNELS."""

    def __init__(self, kernel: str):
        """`kernel` is a name in KERNELS; `resolve` says which one "auto" stands for. Raises Refusal for another."""
        if kernel not in KERNELS:
            raise unknown("model.attention.kernel", kernel, KERNELS)
        self.kernel = kernel

    @staticmethod
    def resolve(section: Mapping[str, Any], platform: str, dtype: str, added: str, head_size: int) -> dict[str, Any]:
        return {**section, "kernel": choose(section["kernel"], platform, dtype, added, head_size)}

    def in_turn(self, encoding: type[PositionalEncoding]) -> bool:
        return self.kernel == "cudnn" and encoding.biased()

    @classmethod
    def check(cls, name: str, encoding: type[PositionalEncoding]) -> None:
        if encoding.turns_features():
            raise Refusal(
                f"model.position.name={name} turns the features of linear attention, softmax attention has none: "
                "choose attention=performer, or another encoding"
            )

    def flops(self, width: int, heads: int, length: int, causal: bool, turned: bool) -> float:
        return 2 * width * ((length + 1) / 2 if causal else length)

    def parts(self, q_positions: Positions, k_positions: Positions, causal: bool) -> Parts:
        if self.kernel != "blocked" or not aligned(q_positions, k_positions):
            return super().parts(q_positions, k_positions, causal)
        return blocks(q_positions.length, causal)

    def keys(self, length: int, causal: bool) -> float:
        in_blocks = self.kernel == "blocked" and causal
        return min(length, (length + block_size(length)) / 2) if in_blocks else length

    def floats(self, heads: int, length: int, causal: bool) -> float:
        # Of every logit that is computed: by XLA's account the blocks are not worked on one at a time.
        if self.kernel == "cudnn":
            return 0
        if self.kernel == "xla":
            return 4 * heads * length
        return 2 * heads * self.keys(length, causal)

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
        plain = aligned(q_positions, k_positions)
        mask = None if plain else visible(q_positions, k_positions, causal)
        return KERNELS[self.kernel](q, k, v, bias, mask, causal=plain and causal)
