"""Positional encodings: one interface, one table, one selector, so that two are never stacked by accident."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rope_lm.positional.additive import Learned, RotarySinusoidal, Sinusoidal
from rope_lm.positional.base import Constant, PositionalEncoding, Shape, at_layer, split_layers
from rope_lm.positional.bias import FIRE, ALiBi, ContinuousBias, KerpleLog, KerplePower, RelativeBias, Sandwich
from rope_lm.positional.content import CoPE, Forgetting, Shaw, TransformerXL
from rope_lm.positional.rotary import (
    DynamicRotary,
    LayeredRotary,
    LinearRotary,
    Llama3Rotary,
    NTKRotary,
    PartialRotary,
    PRoPE,
    Rotary,
    RotaryFeatures,
    XPos,
    YaRN,
)
from rope_lm.positions import View, contiguous
from rope_lm.refusal import Refusal
from rope_lm.settings import build, named

__all__ = [
    "ENCODINGS",
    "Constant",
    "Effects",
    "PositionalEncoding",
    "Shape",
    "at_layer",
    "check_length",
    "effects",
    "make",
    "split_layers",
]

ENCODINGS: dict[str, type[PositionalEncoding]] = {
    "none": PositionalEncoding,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "relative_bias": RelativeBias,
    "alibi": ALiBi,
    "kerple_log": KerpleLog,
    "kerple_power": KerplePower,
    "fire": FIRE,
    "continuous_bias": ContinuousBias,
    "sandwich": Sandwich,
    "rotary": Rotary,
    "rotary_partial": PartialRotary,
    "rotary_layered": LayeredRotary,
    "rotary_linear": LinearRotary,
    "rotary_ntk": NTKRotary,
    "rotary_dynamic": DynamicRotary,
    "yarn": YaRN,
    "llama3": Llama3Rotary,
    "rotary_features": RotaryFeatures,
    "rotary_sinusoidal": RotarySinusoidal,
    "xpos": XPos,
    "p_rope": PRoPE,
    "shaw": Shaw,
    "transformer_xl": TransformerXL,
    "cope": CoPE,
    "forgetting": Forgetting,
}


def make(position: Mapping[str, Any], *, shape: Shape, rngs: nnx.Rngs) -> PositionalEncoding:
    """Build the encoding that a config's model.position describes: its name and its class's keyword arguments.

    Raises Refusal for an unknown name, an unknown or missing key, a value that the encoding does not support, and for
    an encoding that only looks back in a model that looks both ways.
    """
    if named(position, ENCODINGS, "model.position").looks_back and not shape.causal:
        raise Refusal(
            f"model.position.name={position['name']} is defined only for keys before the query, here every token sees "
            "all: choose objective=causal, or another encoding"
        )
    return build(position, ENCODINGS, "model.position", {"shape": shape, "rngs": rngs})


def check_length(encoding: PositionalEncoding, length: int) -> None:
    """Raise Refusal if rows of `length` tokens have an index that the encoding cannot encode."""
    if encoding.limit is not None and length > encoding.limit:
        raise Refusal(
            f"{type(encoding).__name__} encodes indices below {encoding.limit}, the rows have {length} tokens: "
            f"set model.position.limit={length} or shorten data.length"
        )


class Effects(NamedTuple):
    """The effects of an encoding on attention, found by tracing its hooks."""

    bias: bool  # adds to the logits by position alone
    score: bool  # adds to the logits by content too, so differently in every row
    features: bool  # turns the features of linear attention
    relative_norms: bool  # scales queries and keys by each other's positions
    head_size: int  # of queries and keys after `rotate`


def effects(position: Mapping[str, Any], shape: Shape) -> Effects:
    """Return the effects of an encoding in a model of this shape. Raises Refusal as `make` does."""

    turns: list[bool] = []

    def trace() -> Any:
        encoding = at_layer(make(position, shape=shape, rngs=nnx.Rngs(0)), 0)
        memory = encoding.remember(jnp.zeros((1, 2, shape.width)), contiguous(2))
        tokens = replace(contiguous(2), memory=memory)
        view = View(tokens, tokens, shape.causal)
        q = k = jnp.zeros((1, 2, shape.heads, shape.head_size))
        features = jnp.zeros((1, 2, shape.heads, 2))
        turns.append(any(x is not features for x in encoding.turn_features(features, features, view)))
        return encoding.bias(view), encoding.score(q, k, view), encoding.rotate(q, k, view)[0]

    bias, score, rotated = jax.eval_shape(trace)
    relative = named(position, ENCODINGS, "model.position").relative_norms
    return Effects(bias is not None, score is not None, turns[0], relative, rotated.shape[-1])
