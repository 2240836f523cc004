"""Tokens to rows, and rows to batches that are a pure function of (seed, step)."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from grain.experimental import index_shuffle

from rope_lm.refusal import Refusal


class Batch(NamedTuple):
    """What one step consumes, and the sha256 of each member's part of it (little-endian int32, row by row)."""

    rows: np.ndarray  # int32 [M B T+1]
    digests: list[bytes]  # [M]


@runtime_checkable
class Source(Protocol):
    """Rows of length + 1 tokens, by number."""

    length: int

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray: ...  # int [B] -> int32 [B length + 1]


class Rows:
    """Windows of length + 1 tokens, one every `length`, so that each token is a target once."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """int [B] -> int32 [B length + 1]."""
        return self.tokens[numbers[:, None] * self.length + np.arange(self.length + 1)].astype(np.int32)


FAR = 0x9E3779B9  # between the seeds of epochs: 2^32 by the golden ratio, whose multiples keep apart


class Order:
    """Batches by step: every row once in an epoch, in an order that (seed, epoch) alone decides.

    The first epoch is that of Grain's datasets (`shuffle`, `batch`), which fetch one row after another: 0.6 ms for 16
    rows of 128 tokens, here 0.1. An H200 then waited for its input: 2,000 steps of three members took 7.5 s at scale
    nano, and take 2.6. Raises Refusal for fewer rows than a batch has.
    """

    def __init__(self, rows: Source, batch: int, seed: int):
        if len(rows) < batch:
            raise Refusal(
                f"the training text has {len(rows)} rows of {rows.length} tokens, a batch needs {batch}: "
                "give more text, or lower data.length or data.batch"
            )
        self.rows, self.batch, self.seed = rows, batch, seed

    def __getitem__(self, step: int) -> np.ndarray:
        """int32 [B T+1]."""
        places = (divmod(place, len(self.rows)) for place in range(step * self.batch, (step + 1) * self.batch))
        return self.rows[np.array([self._shuffled(*each) for each in places])]

    def _shuffled(self, epoch: int, place: int) -> int:
        """The row at a place of an epoch: what Grain's `shuffle` makes of it, with its own number of rounds."""
        # Grain adds the epoch to the seed: the second epoch of seed 0 is then the first of seed 1.
        seed = (self.seed + epoch * FAR) % 2**32
        return index_shuffle(place, max_index=len(self.rows) - 1, seed=seed, rounds=4)


def ensemble(members: Sequence[Order], start: int, stop: int) -> Iterator[Batch]:
    """Batches for steps start to stop - 1, read ahead by a thread. Members with one seed share a batch."""
    distinct = {id(member): member for member in members}

    def step(number: int) -> Batch:
        rows = {key: np.ascontiguousarray(member[number], "<i4") for key, member in distinct.items()}
        digests = {key: hashlib.sha256(each).digest() for key, each in rows.items()}
        return Batch(np.stack([rows[id(each)] for each in members]), [digests[id(each)] for each in members])

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    yield from grain.MapDataset.range(start, stop).map(step).to_iter_dataset(options)


def chain(consumed: Sequence[str], batch: Batch) -> list[str]:
    """What was consumed, by member, with one more batch: sha256 over the chain so far and the batch's digest, in hex.

    The chain starts as "" and is the same for two runs if and only if they saw the same tokens in the same order.
    """
    links = zip(consumed, batch.digests, strict=True)
    return [hashlib.sha256(bytes.fromhex(before) + digest).hexdigest() for before, digest in links]


def spread(rows: Source, count: int) -> np.ndarray:
    """int32 [count T+1]: rows at even distances over the whole of them, always the same ones."""
    if len(rows) < count:
        raise Refusal(
            f"the validation text has {len(rows)} rows of {rows.length} tokens, data.validation_rows asks for {count}: "
            "give more text, or lower data.validation_rows or data.length"
        )
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
