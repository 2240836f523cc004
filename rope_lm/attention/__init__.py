"""Attention: one interface, one table, one selector."""

from collections.abc import Mapping
from typing import Any

from rope_lm.attention.base import Attention
from rope_lm.attention.performer import Performer
from rope_lm.attention.softmax import Softmax
from rope_lm.positional import PositionalEncoding
from rope_lm.settings import bind, build, named

__all__ = ["ATTENTIONS", "Attention", "make", "resolve"]

ATTENTIONS: dict[str, type[Attention]] = {"softmax": Softmax, "performer": Performer}


def make(attention: Mapping[str, Any]) -> Attention:
    """The attention that a config's model.attention describes: its name and the keyword arguments of its class.

    Raises Refusal for an unknown name, an unknown or missing key, or a value that it cannot have.
    """
    return build(attention, ATTENTIONS, "model.attention", {})


def resolve(
    attention: Mapping[str, Any],
    platform: str,
    dtype: str,
    encoding: type[PositionalEncoding],
    head_size: int,
    apart: int = 1,
) -> dict[str, Any]:
    """The section with what "auto" stands for on a platform, in a dtype, for an encoding, of heads of a size, where
    members are on so many devices of their own.

    Raises Refusal as `make` does, and for what cannot run there.
    """
    cls = named(attention, ATTENTIONS, "model.attention")
    bind(cls, {key: value for key, value in attention.items() if key != "name"}, "model.attention", {})
    added = "nothing" if not encoding.biased() else "many" if encoding.scored() or apart > 1 else "one"
    return cls.resolve(attention, platform, dtype, added, head_size)
