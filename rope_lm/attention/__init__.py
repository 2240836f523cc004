"""Attention: one interface, one table, one selector."""

from collections.abc import Mapping
from typing import Any

from rope_lm.attention.base import Attention
from rope_lm.attention.performer import Performer
from rope_lm.attention.softmax import Softmax
from rope_lm.settings import bind, build, named

__all__ = ["ATTENTIONS", "Attention", "make", "resolve"]

ATTENTIONS: dict[str, type[Attention]] = {"softmax": Softmax, "performer": Performer}


def make(attention: Mapping[str, Any]) -> Attention:
    """The attention that a config's model.attention describes: its name and the keyword arguments of its class.

    Raises Refusal for an unknown name, an unknown or missing key, or a value that it cannot have.
    """
    return build(attention, ATTENTIONS, "model.attention", {})


def resolve(attention: Mapping[str, Any], platform: str, dtype: str, biased: bool, head_size: int) -> dict[str, Any]:
    """The section with what "auto" stands for on a platform, in a dtype, with or without a bias on the logits, of heads
    of a size.

    Raises Refusal as `make` does, and for what cannot run there.
    """
    cls = named(attention, ATTENTIONS, "model.attention")
    bind(cls, {key: value for key, value in attention.items() if key != "name"}, "model.attention", {})
    return cls.resolve(attention, platform, dtype, biased, head_size)
