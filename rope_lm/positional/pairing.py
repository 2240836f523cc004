"""Conventions for the pairs of components that rotary rotates together, and conversion between them.

They define the same encoding, for weights that are permuted accordingly. `rope_lm.positional.rotary` uses half-split
pairs over the whole head.
"""

import numpy as np

from rope_lm.refusal import Refusal

PAIRINGS = ("half-split", "interleaved", "first")


def order(pairing: str, size: int, turned: int) -> np.ndarray:
    """Return the index in another pairing of each component in ours.

    `ours = theirs[..., order]`, and back `theirs = ours[..., argsort(order)]`. `turned`: components that are rotated,
    out of `size`. "half-split" rotates the whole head and pairs i with i + turned/2 (Llama). "interleaved" pairs 2i
    with 2i + 1 (RoFormer, GPT-J). "first" pairs i with i + turned/2 among the first `turned` components and leaves the
    rest as they are (GPT-NeoX). Raises Refusal for an unknown pairing, and for sizes that are odd or do not fit.
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
