"""Tokens to rows, and rows to batches: a batch is a pure function of (seed, step)."""

import hashlib
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int, Int32, UInt16

from rope_lm.refusal import Refusal


@runtime_checkable
class Rows(Protocol):
    """Rows of `length` + 1 tokens, indexed by row number."""

    length: int

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Int[np.ndarray, "R"]) -> Int32[np.ndarray, "R W"]: ...


class Windows:
    """Windows of `length` + 1 tokens that start every `length` tokens, so that each token is a target once."""

    def __init__(self, tokens: UInt16[np.ndarray, "tokens"], length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, numbers: Int[np.ndarray, "R"]) -> Int32[np.ndarray, "R W"]:
        return self.tokens[numbers[:, None] * self.length + np.arange(self.length + 1)].astype(np.int32)

    def documents(self, numbers: Int[np.ndarray, "R"], separator: int) -> Int32[np.ndarray, "R W"]:
        """Return the number of each token's document within the text. A separator belongs to the document it ends."""
        ends = np.flatnonzero(self.tokens == separator)
        places = numbers[:, None] * self.length + np.arange(self.length + 1)
        return np.searchsorted(ends, places).astype(np.int32)


class Batch(NamedTuple):
    """The rows that a step consumes, and their sha256 per member (little-endian int32, row by row)."""

    rows: Int32[np.ndarray, "M B W"]
    digests: list[bytes]  # [M]


EPOCH = 0x9E3779B9  # distance of two epochs' seeds: 2^32 by the golden ratio, whose multiples are far apart


def check(rows: Rows, size: int) -> None:
    """Raise Refusal if there are fewer rows than a batch needs."""
    if len(rows) < size:
        raise Refusal(
            f"the training text has {len(rows)} rows of {rows.length} tokens, a batch needs {size}: "
            "give more text, or lower data.length or data.batch"
        )


def draw(rows: Rows, size: int, seed: int, step: int) -> Int32[np.ndarray, "B W"]:
    """Return the batch of a step. Each epoch visits every row once, in an order fixed by (seed, epoch).

    The first epoch is the one that Grain's `shuffle` and `batch` give. They are not used, because they fetch one row at
    a time, which would keep a fast accelerator waiting.
    """

    def number(place: int) -> int:
        epoch, place = divmod(place, len(rows))
        # Grain adds the epoch to the seed: the second epoch of seed 0 would be the first of seed 1.
        return index_shuffle(place, max_index=len(rows) - 1, seed=(seed + epoch * EPOCH) % 2**32, rounds=4)

    return rows[np.array([number(place) for place in range(step * size, (step + 1) * size)])]


def ensemble(rows: Rows, size: int, seeds: Sequence[int], start: int, stop: int) -> Generator[Batch, None, None]:
    """Yield the batches of steps `start` to `stop` - 1, prefetched by a thread. Members with equal seeds share one."""

    def read(step: int) -> Batch:
        drawn = {seed: draw(rows, size, seed, step) for seed in set(seeds)}
        digests = {seed: hashlib.sha256(member.astype("<i4").tobytes()).digest() for seed, member in drawn.items()}
        return Batch(np.stack([drawn[seed] for seed in seeds]), [digests[seed] for seed in seeds])

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    yield from grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)


def chain(consumed: Sequence[str], batch: Batch) -> list[str]:
    """Return each member's hash chain of consumed batches, in hex, extended by one batch.

    The new hash is the sha256 of the old one followed by the batch's digest; the first is "". Two runs have the same
    hash if and only if they saw the same tokens in the same order.
    """
    links = zip(consumed, batch.digests, strict=True)
    return [hashlib.sha256(bytes.fromhex(before) + digest).hexdigest() for before, digest in links]


def spread(rows: Rows, count: int) -> Int[np.ndarray, "count"]:
    """Return the numbers of `count` rows spread evenly over all rows; the same ones on every call.

    Raises Refusal if there are fewer.
    """
    if len(rows) < count:
        raise Refusal(
            f"the validation text has {len(rows)} rows of {rows.length} tokens, data.validation_rows asks for {count}: "
            "give more text, or lower data.validation_rows or data.length"
        )
    return np.linspace(0, len(rows) - 1, count).round().astype(int)
