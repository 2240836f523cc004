"""Positional encodings: one interface, one table, one selector (so no two are ever stacked by accident)."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from rope_lm.positional.additive import Learned, RotarySinusoidal, Sinusoidal
from rope_lm.positional.base import Added, Parts, PositionalEncoding, Shape, einsum, for_rows
from rope_lm.positional.bias import FIRE, ALiBi, ContinuousBias, KerpleLog, KerplePower, RelativeBias, Sandwich
from rope_lm.positional.content import CoPE, Shaw, TransformerXL
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
from rope_lm.refusal import Refusal
from rope_lm.settings import build, named

__all__ = [
    "ENCODINGS",
    "Added",
    "Parts",
    "PositionalEncoding",
    "Shape",
    "abstract",
    "einsum",
    "encoding",
    "for_rows",
    "make",
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
}


def encoding(position: Mapping[str, Any]) -> type[PositionalEncoding]:
    """The class that a config's model.position names. Raises Refusal for an unknown name."""
    return named(position, ENCODINGS, "model.position")


def make(position: Mapping[str, Any], *, shape: Shape, rngs: nnx.Rngs) -> PositionalEncoding:
    """The encoding that `position` describes: its name and the keyword arguments of its class.

    Raises Refusal for an unknown name, an unknown or missing key, a value that the encoding cannot have, and for an
    encoding that looks back alone in a model that looks both ways.
    """
    if encoding(position).backward and not shape.causal:
        raise Refusal(
            f"model.position.name={position['name']} is defined for keys before the query alone, here every "
            "token sees all: choose objective=causal, or another encoding"
        )
    return build(position, ENCODINGS, "model.position", {"shape": shape, "rngs": rngs})


def abstract(position: Mapping[str, Any], shape: Shape) -> PositionalEncoding:
    """What `make` makes, without the values of its parameters."""
    return nnx.eval_shape(lambda: make(position, shape=shape, rngs=nnx.Rngs(0)))
