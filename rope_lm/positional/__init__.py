"""Positional encodings: one interface, one table, one selector (so no two are ever stacked by accident)."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from rope_lm.positional.additive import Learned, Sinusoidal
from rope_lm.positional.base import PositionalEncoding, Shape
from rope_lm.positional.bias import FIRE, ALiBi, KerpleLog, KerplePower, RelativeBias, Sandwich
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
    XPos,
    YaRN,
)
from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import bind

__all__ = ["ENCODINGS", "PositionalEncoding", "Shape", "encoding", "make"]

ENCODINGS: dict[str, type[PositionalEncoding]] = {
    "none": PositionalEncoding,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "relative_bias": RelativeBias,
    "alibi": ALiBi,
    "kerple_log": KerpleLog,
    "kerple_power": KerplePower,
    "fire": FIRE,
    "sandwich": Sandwich,
    "rotary": Rotary,
    "rotary_partial": PartialRotary,
    "rotary_layered": LayeredRotary,
    "rotary_linear": LinearRotary,
    "rotary_ntk": NTKRotary,
    "rotary_dynamic": DynamicRotary,
    "yarn": YaRN,
    "llama3": Llama3Rotary,
    "xpos": XPos,
    "p_rope": PRoPE,
    "shaw": Shaw,
    "transformer_xl": TransformerXL,
    "cope": CoPE,
}


def encoding(position: Mapping[str, Any]) -> type[PositionalEncoding]:
    """The class that a config's model.position names. Raises Refusal for an unknown name."""
    if "name" not in position:
        raise Refusal(f"model.position has no name: give one of {', '.join(ENCODINGS)}")
    if position["name"] not in ENCODINGS:
        raise unknown("model.position.name", str(position["name"]), ENCODINGS)
    return ENCODINGS[position["name"]]


def make(position: Mapping[str, Any], *, shape: Shape, rngs: nnx.Rngs) -> PositionalEncoding:
    """The encoding that `position` describes: its name and the keyword arguments of its class.

    Raises Refusal for an unknown name, an unknown or missing key, or a value that the encoding cannot have.
    """
    cls = encoding(position)
    arguments = {key: value for key, value in position.items() if key != "name"}
    return cls(**bind(cls, arguments, where="model.position", given={"shape": shape, "rngs": rngs}))
