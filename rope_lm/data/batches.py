"""Tokens to rows, and rows to batches that are a pure function of (seed, step)."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from rope_lm.refusal import Refusal


class Rows:
    """Windows of length + 1 tokens, one every `length`, so that each token is a target once: a source for Grain."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, row: int) -> np.ndarray:
        """int32 [length + 1]."""
        start = row * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int32)


def shuffled(rows: Rows, batch: int, seed: int) -> grain.MapDataset:
    """Batches [B T+1] by step: every row once in an epoch, in an order that (seed, epoch) alone decides."""
    if len(rows) < batch:
        raise Refusal(
            f"the training text has {len(rows)} rows of {rows.length} tokens, a batch needs {batch}: "
            "give more text, or lower data.length or data.batch"
        )
    return grain.MapDataset.source(rows).shuffle(seed=seed).repeat().batch(batch, drop_remainder=True)


def ensemble(members: Sequence[grain.MapDataset], start: int, stop: int) -> Iterator[np.ndarray]:
    """Batches [M B T+1] for steps start to stop - 1, read ahead by threads. Members with one seed share a batch."""
    distinct = {id(member): member for member in members}

    def step(number: int) -> np.ndarray:
        batch = {key: member[number] for key, member in distinct.items()}
        return np.stack([batch[id(member)] for member in members])

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    yield from grain.MapDataset.range(start, stop).map(step).to_iter_dataset(options)


def spread(rows: Rows, count: int) -> np.ndarray:
    """int32 [count T+1]: rows at even distances over the whole of them, always the same ones."""
    if len(rows) < count:
        raise Refusal(
            f"the validation text has {len(rows)} rows of {rows.length} tokens, data.validation asks for {count}: "
            "give more text, or lower data.validation or data.length"
        )
    return np.stack([rows[row] for row in np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()])
