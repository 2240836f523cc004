"""A layer of the model: what its linear maps, norms and MLP are, and how they join the stream."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rope_lm.positional import einsum
from rope_lm.refusal import Refusal, unknown

# Queries, keys and values of a layer -> what its queries gather, and what is kept of the layer for the cache.
Attend = Callable[
    [Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"]], tuple[Float[Array, "B T N H"], Any]
]


@jax.custom_vjp
def product(x: Float[Array, "R D"], w: Float[Array, "D F"]) -> Float[Array, "R F"]:
    """x w. The gradient of a w that makes its rows narrower is computed as [F D] and turned: of the two arrays that are
    multiplied the narrower one is then copied first, and a layer's last map has 97 GFLOP/s on a CPU core instead of 55
    (3% of a step; 128 wide, four times that inside)."""
    return einsum("rd,df->rf", x, w)


def _of_product(kept: tuple[Array, Array], g: Float[Array, "R F"]) -> tuple[Array, Array]:
    x, w = kept
    if w.shape[0] > w.shape[1]:
        of_w = jax.lax.optimization_barrier(einsum("rf,rd->fd", g, x)).T  # else XLA turns it back
    else:
        of_w = einsum("rd,rf->df", x, g)
    return einsum("rf,df->rd", g, w), of_w


product.defvjp(lambda x, w: (product(x, w), (x, w)), _of_product)


class Linear(nnx.Module):
    """y = x w, or x w + b. Initial values of w are normal with variance `gain`^2 / D, those of b are zero."""

    def __init__(
        self,
        size: tuple[int, int],
        axes: tuple[str, str],
        gain: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        biases: bool = False,
    ):
        std = gain / math.sqrt(size[0])
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), size), axes=axes, decays=True)
        self.bias = nnx.Param(jnp.zeros(size[1]), axes=axes[1:], decays=False) if biases else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R F"]:
        y = product(x, self.weight[...].astype(self.dtype))
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(self.dtype), "product")


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 (arXiv 1910.07467). It has no bias."""

    def __init__(self, width: int, epsilon: float, biases: bool):
        self.scale = nnx.Param(jnp.ones(width), axes=("width",), decays=False)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias, computed in float32 (arXiv 1607.06450)."""

    def __init__(self, width: int, epsilon: float, biases: bool):
        self.scale = nnx.Param(jnp.ones(width), axes=("width",), decays=False)
        self.bias = nnx.Param(jnp.zeros(width), axes=("width",), decays=False) if biases else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        x32 = x32 * inverse * self.scale[...]
        return (x32 if self.bias is None else x32 + self.bias[...]).astype(x.dtype)


NORMS: dict[str, Callable[[int, float, bool], nnx.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


class MLP(NamedTuple):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where it is gated (arXiv 2002.05202)."""

    activation: Callable[[Float[Array, "R F"]], Float[Array, "R F"]]
    gated: bool


MLPS = {
    "gelu": MLP(jax.nn.gelu, gated=False),  # by tanh, as in GPT-2 (arXiv 1606.08415, section 2)
    "gelu_exact": MLP(partial(jax.nn.gelu, approximate=False), gated=False),
    "swiglu": MLP(jax.nn.silu, gated=True),
}


def _pre(block: "Block", x: Float[Array, "R D"], attention: Callable) -> tuple[Float[Array, "R D"], Any]:
    y, kept = attention(block.attention_norm(x))
    x = x + y
    return x + block.mlp(block.mlp_norm(x)), kept


def _parallel(block: "Block", x: Float[Array, "R D"], attention: Callable) -> tuple[Float[Array, "R D"], Any]:
    y, kept = attention(block.attention_norm(x))
    return x + y + block.mlp(block.mlp_norm(x)), kept


def _post(block: "Block", x: Float[Array, "R D"], attention: Callable) -> tuple[Float[Array, "R D"], Any]:
    y, kept = attention(x)
    x = block.attention_norm(x + y)
    return block.mlp_norm(x + block.mlp(x)), kept


class Residual(NamedTuple):
    """How attention and the MLP join the stream of a block, and where the model's own norm stands."""

    join: Callable[["Block", Float[Array, "R D"], Callable], tuple[Float[Array, "R D"], Any]]
    norm_first: bool  # before the blocks, on the embeddings; otherwise after the blocks, before the logits


RESIDUALS = {
    "pre": Residual(_pre, norm_first=False),  # arXiv 2002.04745
    "parallel": Residual(_parallel, norm_first=False),  # GPT-J; GPT-NeoX, arXiv 2204.06745, section 2.1
    "post": Residual(_post, norm_first=True),  # arXiv 1706.03762, section 3.1; BERT
}


@dataclass(frozen=True)
class Style:
    """What layers are made of, beside their sizes: the section `model.block` of a config.

    `norm` and its `epsilon`, `mlp` and `residual` as in the tables above; `biases` on linear maps, and on norms that
    can have one; `transform`: a linear map, an activation and a norm before the logits, and a bias on them, as in
    BERT's head for masked language modelling. Raises Refusal for a name that is not in a table.
    """

    norm: str
    epsilon: float
    mlp: str
    biases: bool
    residual: str
    transform: bool

    def __post_init__(self) -> None:
        for key, table in (("norm", NORMS), ("mlp", MLPS), ("residual", RESIDUALS)):
            if getattr(self, key) not in table:
                raise unknown(f"model.block.{key}", getattr(self, key), table)
        if not self.epsilon > 0:
            raise Refusal(f"model.block.epsilon={self.epsilon}: must be above 0, as 1e-6 (added to a mean square)")

    def make_norm(self, width: int) -> nnx.Module:
        return NORMS[self.norm](width, self.epsilon, self.biases)

    def inner(self, hidden: int) -> int:
        """Results of products inside the MLP, of one token."""
        return (1 + MLPS[self.mlp].gated) * hidden

    def weights(self, width: int, hidden: int) -> int:
        """Of the matrix products of one block."""
        return width * (4 * width + self.inner(hidden) + hidden)


class Block(nnx.Module):
    """Attention and an MLP, each with a norm, joined to the stream as the style says."""

    def __init__(
        self, width: int, heads: int, hidden: int, layers: int, style: Style, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.heads, self.style = heads, style

        def linear(inner: int, outer: int, axes: tuple[str, str], gain: float = 1.0) -> Linear:
            return Linear((inner, outer), axes, gain, dtype, rngs, style.biases)

        # Keeps the variance of the stream at the depth's end near that of its start.
        residual = 1 / math.sqrt(2 * layers)
        self.attention_norm = style.make_norm(width)
        # One product for q, k and v, heads outermost: a mesh that splits the heads then splits no head.
        self.qkv = linear(width, 3 * width, ("width", "heads"))
        self.out = linear(width, width, ("heads", "width"), residual)
        self.mlp_norm = style.make_norm(width)
        self.up = linear(width, hidden, ("width", "hidden"))
        self.down = linear(hidden, width, ("hidden", "width"), residual)
        self.gate = linear(width, hidden, ("width", "hidden")) if MLPS[style.mlp].gated else None

    def __call__(self, x: Float[Array, "R D"], batch: int, attend: Attend) -> tuple[Float[Array, "R D"], Any]:
        """x [B*T D] after the block, and what `attend` keeps."""
        return RESIDUALS[self.style.residual].join(self, x, partial(self.attention, batch=batch, attend=attend))

    def attention(self, x: Float[Array, "R D"], batch: int, attend: Attend) -> tuple[Float[Array, "R D"], Any]:
        rows, width = x.shape
        qkv = self.qkv(x).reshape(batch, rows // batch, self.heads, 3, width // self.heads)
        q, k, v = (
            part.squeeze(3) for part in jnp.split(qkv, 3, axis=3)
        )  # the gradient of a split is one concatenation
        attended, kept = attend(q, k, v)
        return self.out(attended.reshape(rows, width)), kept

    def mlp(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        activation = MLPS[self.style.mlp].activation
        up = self.up(x)
        return self.down(activation(up) if self.gate is None else activation(self.gate(x)) * up)


class Transform(nnx.Module):
    """What BERT has between its last layer and the logits (arXiv 1810.04805, in the released code): a linear map, the
    activation, a norm; and a bias on the logits."""

    def __init__(self, width: int, vocabulary: int, style: Style, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = Linear((width, width), ("width", "heads"), 1.0, dtype, rngs, style.biases)
        self.norm = style.make_norm(width)
        self.bias = nnx.Param(jnp.zeros(vocabulary), axes=("vocabulary",), decays=False)
        self.activation = MLPS[style.mlp].activation

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return self.norm(self.activation(self.dense(x)))
