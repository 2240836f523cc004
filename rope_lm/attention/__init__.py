"""Attention: one interface, one table, one selector."""

from collections.abc import Mapping
from typing import Any

from rope_lm.attention.base import Attention, Turn
from rope_lm.attention.performer import Performer
from rope_lm.attention.softmax import Softmax
from rope_lm.settings import build

__all__ = ["ATTENTIONS", "Attention", "Performer", "Softmax", "Turn", "make"]

ATTENTIONS: dict[str, type[Attention]] = {"softmax": Softmax, "performer": Performer}


def make(attention: Mapping[str, Any], *, head_size: int) -> Attention:
    """Build the attention that a config's model.attention describes, for heads of this size before `rotate`.

    Raises Refusal for an unknown name, an unknown or missing key, or a value out of range.
    """
    return build(attention, ATTENTIONS, "model.attention", {"head_size": head_size})
