"""A layer of the model: its linear maps, norms and MLP, and how they join the residual stream."""

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

from rope_lm.kernels.products import linear
from rope_lm.positional import Shape
from rope_lm.refusal import Refusal, unknown

# From the input of a layer's attention to its output before the last linear map, and what the layer hands back.
Attend = Callable[[Float[Array, "R D"]], tuple[Float[Array, "R _"], Any]]


class Linear(nnx.Module):
    """y = x w, or x w + b. Initial weights are normal with variance `gain`^2 / D; biases start at zero."""

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
        y = linear(x, self.weight[...].astype(self.dtype))
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


def _pre(block: "Block", x: Float[Array, "R D"], attend: Attend) -> tuple[Float[Array, "R D"], Any]:
    y, kept = block.attention(block.attention_norm(x), attend)
    x = x + y
    return x + block.mlp(block.mlp_norm(x)), kept


def _parallel(block: "Block", x: Float[Array, "R D"], attend: Attend) -> tuple[Float[Array, "R D"], Any]:
    y, kept = block.attention(block.attention_norm(x), attend)
    return x + y + block.mlp(block.mlp_norm(x)), kept


def _post(block: "Block", x: Float[Array, "R D"], attend: Attend) -> tuple[Float[Array, "R D"], Any]:
    y, kept = block.attention(x, attend)
    x = block.attention_norm(x + y)
    return block.mlp_norm(x + block.mlp(x)), kept


class Residual(NamedTuple):
    """The order of norms, attention, MLP and residual connections in a block, and where the model's extra norm goes."""

    join: Callable[["Block", Float[Array, "R D"], Attend], tuple[Float[Array, "R D"], Any]]
    norm_first: bool  # True: before the blocks, on the embeddings; False: after the blocks, before the logits


RESIDUALS = {
    "pre": Residual(_pre, norm_first=False),  # arXiv 2002.04745
    "parallel": Residual(_parallel, norm_first=False),  # GPT-J; GPT-NeoX, arXiv 2204.06745, section 2.1
    "post": Residual(_post, norm_first=True),  # arXiv 1706.03762, section 3.1; BERT
}


@dataclass(frozen=True)
class Style:
    """The kind of layers, apart from their sizes: the section `model.block` of a config.

    `norm`, `mlp` and `residual`: names in NORMS, MLPS and RESIDUALS. `epsilon`: of the norms. `biases`: True for biases
    on linear maps and layer norms. `transform`: True for a linear map, an activation and a norm before the logits, and
    a bias on the logits, as in BERT's head for masked language modelling. Raises Refusal for an unknown name.
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
        """Build a norm of this style."""
        return NORMS[self.norm](width, self.epsilon, self.biases)


class Block(nnx.Module):
    """Attention and an MLP, each with a norm, joined to the residual stream as the style says."""

    def __init__(self, shape: Shape, hidden: int, style: Style, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads, self.head_size, self.style = shape.heads, shape.head_size, style
        width, inner = shape.width, shape.heads * shape.head_size

        def layer(rows: int, columns: int, axes: tuple[str, str], gain: float = 1.0) -> Linear:
            return Linear((rows, columns), axes, gain, dtype, rngs, style.biases)

        # Keeps the variance of the stream at the last layer near that at the first.
        residual = 1 / math.sqrt(2 * shape.layers)
        self.attention_norm = style.make_norm(width)
        # One product for q, k and v, heads outermost, so that a mesh that splits the heads splits no head.
        self.qkv = layer(width, 3 * inner, ("width", "heads"))
        self.out = layer(inner, width, ("heads", "width"), residual)
        self.mlp_norm = style.make_norm(width)
        self.up = layer(width, hidden, ("width", "hidden"))
        self.down = layer(hidden, width, ("hidden", "width"), residual)
        self.gate = layer(width, hidden, ("width", "hidden")) if MLPS[style.mlp].gated else None

    def __call__(self, x: Float[Array, "R D"], attend: Attend) -> tuple[Float[Array, "R D"], Any]:
        """Return x [B*T D] after the block, and the second value that `attend` returned."""
        return RESIDUALS[self.style.residual].join(self, x, attend)

    def queries_keys_values(
        self, x: Float[Array, "R D"], batch: int
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"]]:
        """Return the queries, keys and values of x [B*T D]."""
        qkv = self.qkv(x).reshape(batch, len(x) // batch, self.heads, 3, self.head_size)
        q, k, v = jnp.split(qkv, 3, axis=3)  # the gradient of a split is one concatenation
        return q.squeeze(3), k.squeeze(3), v.squeeze(3)

    def attention(self, x: Float[Array, "R D"], attend: Attend) -> tuple[Float[Array, "R D"], Any]:
        """Return the output of attention for its input x, and the second value that `attend` returned."""
        attended, kept = attend(x)
        return self.out(attended), kept

    def mlp(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        """Return the MLP's output."""
        activation = MLPS[self.style.mlp].activation
        up = self.up(x)
        return self.down(activation(up) if self.gate is None else activation(self.gate(x)) * up)


class Transform(nnx.Module):
    """BERT's head: a linear map, the activation and a norm before the logits, and a bias on them.

    Source: arXiv 1810.04805, in the released code.
    """

    def __init__(self, width: int, vocabulary: int, style: Style, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = Linear((width, width), ("width", "heads"), 1.0, dtype, rngs, style.biases)
        self.norm = style.make_norm(width)
        self.bias = nnx.Param(jnp.zeros(vocabulary), axes=("vocabulary",), decays=False)
        self.activation = MLPS[style.mlp].activation

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return self.norm(self.activation(self.dense(x)))
