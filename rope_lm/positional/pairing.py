"""Which components of a head are turned together: three conventions, and the order that turns one into another.

Rotating pairs of components is the same encoding whichever pairs they are, for weights that are permuted alike. Here
the pairing is half-split, over the whole head (`rope_lm.positional.rotary`).
"""

import numpy as np

from rope_lm.refusal import Refusal

PAIRINGS = ("half-split", "interleaved", "first")


def order(pairing: str, size: int, turned: int) -> np.ndarray:
    """For each component of a head in our layout, its place in the other: `ours = theirs[..., order]`, and back
    `theirs = ours[..., argsort(order)]`.

    "half-split" pairs i with i + turned/2 in heads that are turned whole (Llama); "interleaved" 2i with 2i + 1
    (RoFormer, GPT-J); "first" i with i + turned/2 among the first `turned` components, the rest not being turned
    (GPT-NeoX). Raises Refusal for an unknown pairing, and for sizes that are odd or do not fit.
    """
    if pairing not in PAIRINGS:
        raise Refusal(f"pairing {pairing!r}: must be one of {', '.join(PAIRINGS)}")
    if size % 2 or turned % 2 or not 0 < turned <= size:
        raise Refusal(f"a head of {size} components of which {turned} are turned: both must be even, at most {size}")
    if pairing == "half-split":
        return np.arange(size)
    whole = np.arange(turned).reshape(-1, 2) if pairing == "interleaved" else np.arange(turned).reshape(2, -1).T
    rest = np.arange(turned, size).reshape(2, -1).T
    return np.concatenate([whole, rest]).T.ravel()
