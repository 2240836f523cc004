"""How a platform runs a program: chosen here, but for the kernel of attention, which hangs on the encoding too
(attention/softmax.py). It changes how long training takes, and what is learned by rounding alone."""

from collections.abc import Mapping
from typing import NamedTuple

WRITTEN_OUT = {"cpu": 4, "gpu": 12}  # layers at most


class Execution(NamedTuple):
    """What the manifest of a run says of it."""

    in_turn: bool  # members one after another, instead of all at once
    pieces: int  # of a batch, one after another
    written_out: bool  # the layers, instead of a loop
    in_place: bool  # a step's state takes the memory of the one before


def choose(
    platform: str,
    mesh: Mapping[str, int],
    layers: int,
    remat: str,
    batch: int,
    accumulate: int,
    length: int,
    in_turn: bool,
) -> Execution:
    """For a `platform` as JAX names it, and a mesh of these sizes that divide the rows of `batch`; `in_turn`: members
    cannot be computed at once. Times were measured on two CPU cores, a device each (128 wide, 4 layers, length 256,
    batch 16), and on an H200 (GPT-2 small: 32 rows of 1,024 tokens, 50,257 of them, bfloat16)."""
    # A loop has to put what it keeps into larger arrays. Without it XLA keeps what it likes, whatever `remat` says, but
    # for "full", which asks for little memory and so stays a loop: 205 ms a step become 189, and 85 on the H200 76. Few
    # layers alone: compiling is to stay short.
    written_out = layers <= WRITTEN_OUT.get(platform, 0) and remat != "full"
    if platform != "cpu":
        return Execution(
            in_turn=in_turn and mesh["member"] == 1,
            pieces=accumulate,
            written_out=written_out,
            in_place=True,
        )
    return Execution(
        # A batch dimension, even of one, makes matrix products a third slower: 143 ms a step of one member become 194.
        in_turn=mesh["member"] == 1,
        pieces=accumulate * _that_fit_a_cache(batch // accumulate // (mesh["data"] * mesh["fsdp"]), length),
        written_out=written_out,
        # XLA then copies parameters and moments first, to read them once more: 2% of a step, and as much memory.
        in_place=False,
    )


def _that_fit_a_cache(rows: int, length: int) -> int:
    """As many pieces of a device's rows as leave each at least 512 tokens, so that what it works on stays in its core's
    cache. On an Intel Xeon, which has 2 MB for a core, 334 ms a step become 246 (263 with 1,024 tokens); on an AMD EPYC
    209 became 193 to 201 (189 with 1,024)."""
    finer = [count for count in range(1, rows + 1) if rows % count == 0 and rows // count * length >= 512]
    return max(finer, default=1)
