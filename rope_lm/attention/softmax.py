"""Softmax attention and its kernels: one per platform, chosen here and nowhere else."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rope_lm.attention.base import Attention, Turn
from rope_lm.positional import Added, Parts, PositionalEncoding, for_rows
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
    return jax.nn.dot_product_attention(q, k, v, bias=added, mask=mask, is_causal=causal, implementation="xla")


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
    return jax.nn.dot_product_attention(q, k, v, bias=added, mask=mask, is_causal=causal, implementation="cudnn")


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
    parts = blocks(q.shape[1], causal)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B N T H]: every block below is then a plain batched product
    q = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    # Split and joined, not sliced: the gradient of a slice is a padded array, 5% of a step.
    starts = [queries.start for queries, _ in parts]
    q_blocks, k_blocks, v_blocks = (jnp.split(x, starts[1:], axis=2) for x in (q, k, v))
    out = []
    for number, (block, (queries, keys)) in enumerate(zip(q_blocks, parts, strict=True)):
        seen_k, seen_v = k, v
        if causal:
            seen_k, seen_v = (jnp.concatenate(x[: number + 1], axis=2) for x in (k_blocks, v_blocks))
        logits = jnp.einsum("bnth,bnsh->bnts", block, seen_k, preferred_element_type=jnp.float32)
        if bias is not None:
            part = bias[number]
            logits = logits + (for_rows(part[0], len(q)) if part.shape[0] == 1 else part)
        if causal:
            ahead = jnp.arange(keys.stop)[None, :] > jnp.arange(queries.start, queries.stop)[:, None]
            # Added, where a selection would end XLA's fusion: a layer then takes 17 ms, forward and backward, not 22.
            logits = logits + jnp.where(ahead, HIDDEN, 0.0)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        # Normalising after the product with the values divides [T H] numbers instead of [T S].
        values = jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), seen_v, preferred_element_type=jnp.float32)
        out.append(values / weights.sum(-1, keepdims=True))
    return jnp.concatenate(out, axis=2).swapaxes(1, 2).astype(q.dtype)


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

    def flops(self, width: int, heads: int, length: int, causal: bool) -> float:
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
