"""The interface of every positional encoding. The base class is the identity: no position at all."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from rope_lm.positions import Positions, View


class Shape(NamedTuple):
    """The sizes of the model that an encoding acts in."""

    width: int
    heads: int
    head_size: int
    layers: int
    causal: bool  # True if no query sees a key after it


class Constant(nnx.Variable):
    """Numbers computed from the config. They are not trained; `axes` names their dimensions like a parameter's."""


def parameter(value: Float[Array, "..."], *axes: str) -> nnx.Param:
    """Return a trained parameter of an encoding, which is never decayed. `axes` names its dimensions."""
    return nnx.Param(value, axes=axes, decays=False)


class PositionalEncoding(nnx.Module):
    """No position at all (NoPE). An encoding overrides the places where it acts: embeddings, queries and keys, logits.

    It is built from the keyword arguments of its config row, the model's `shape`, and `rngs`. The stream `position` of
    `rngs` belongs to the encoding alone, so drawing from it changes no other parameter. A parameter or constant
    whose first axis is "layer" is sliced by the loop over layers, so a hook sees the values of its own layer. Angles,
    tables and biases are float32 whatever the dtype of the activations, because bfloat16 rounds 257 to 256.

    Dimensions: B batch, T query length, S key length, D width, N heads, H head size, F features.
    """

    limit: int | None = None  # first index that it cannot encode
    looks_back: bool = False  # True if it is defined only for keys that are not after the query
    turns_alone: bool = True  # True if `rotate` turns a key by that key's own position alone
    relative_norms: bool = False  # True if `rotate` scales queries and keys by each other's positions

    def __init__(self, *, shape: Shape, rngs: nnx.Rngs):
        pass

    def embed(self, x: Float[Array, "B T D"], positions: Positions) -> Float[Array, "B T D"]:
        """Act on the token embeddings, once per forward pass."""
        return x

    def remember(self, x: Float[Array, "B T D"], positions: Positions) -> Any:
        """Return what later hooks need from a layer's input: a tree of arrays [B T ...], cached with the keys.

        `rotate` and `score` find it in `view.q.memory` and `view.k.memory`.
        """
        return None

    def rotate(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View
    ) -> tuple[Float[Array, "B T N _"], Float[Array, "B S N _"]]:
        """Act on queries and keys, once per layer. The result may have larger heads."""
        return q, k

    def bias(self, view: View) -> Float[Array, "#B N T S"] | None:
        """Return the float32 term of the attention logits that depends on position alone; once for all layers."""
        return None

    def score(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], view: View
    ) -> Float[Array, "B N T S"] | None:
        """Return the float32 term of the attention logits that depends on position and content; once per layer.

        `q` and `k` are those before `rotate`. The keys run, in order and without gaps, from the first to the last key
        that any of these queries sees. Values for keys that a query does not see are masked later; they must be finite.
        """
        return None

    def turn_features(
        self, q: Float[Array, "B T N F"], k: Float[Array, "B S N F"], view: View
    ) -> tuple[Float[Array, "B T N F"], Float[Array, "B S N F"]]:
        """Act on the features of linear attention, in its numerator, once per layer."""
        return q, k


def split_layers(encoding: PositionalEncoding) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Split an encoding for `nnx.merge`: its graph, the variables with a layer axis, and those that layers share."""

    def has_layers(path: tuple, variable: nnx.Variable) -> bool:
        return variable.axes[:1] == ("layer",)

    graph, layered, *shared = nnx.split(encoding, has_layers, ...)
    return graph, layered, shared[0]


def at_layer(encoding: PositionalEncoding, layer: int) -> PositionalEncoding:
    """Return an encoding as one layer sees it."""
    graph, layered, shared = split_layers(encoding)
    return nnx.merge(graph, jax.tree.map(lambda x: x[layer], layered), shared)
