"""Batches are a pure function of (seed, step), and every validation target knows its document."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from rope_lm import data
from rope_lm.data import batches

LENGTH, BATCH = 4, 3


@pytest.fixture(scope="module")
def rows() -> batches.Windows:
    return batches.Windows(np.arange(20 * LENGTH + 2, dtype=np.uint16), LENGTH)  # 20 rows and a rest


def test_rows_overlap_by_one_token_so_that_each_token_is_a_target_once(rows: batches.Windows) -> None:
    assert len(rows) == 20
    targets = rows[np.arange(20)][:, 1:]
    np.testing.assert_array_equal(targets.ravel(), np.arange(1, 20 * LENGTH + 1))


def test_each_row_comes_once_per_epoch_in_a_new_order_each_time(rows: batches.Windows) -> None:
    drawn = np.concatenate([batches.draw(rows, BATCH, 0, step)[:, 0] // LENGTH for step in range(40)])
    epochs = drawn[:100].reshape(5, 20)
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_no_two_seeds_share_an_epoch(rows: batches.Windows) -> None:
    drawn = [np.concatenate([batches.draw(rows, BATCH, seed, step)[:, 0] for step in range(20)]) for seed in range(6)]
    assert len({tuple(epoch) for seed in drawn for epoch in seed.reshape(3, 20)}) == 18


def test_reading_ahead_gives_the_same_batches_from_any_start(rows: batches.Windows) -> None:
    for start in (0, 5):
        read = batches.ensemble(rows, BATCH, [1, 2, 1], start, 9)
        for step, (batch, digests) in zip(range(start, 9), read, strict=True):
            assert digests[0] == digests[2] == hashlib.sha256(batch[0].astype("<i4").tobytes()).digest() != digests[1]
            assert batch.shape == (3, BATCH, LENGTH + 1) and batch.dtype == np.int32
            for member, seed in enumerate([1, 2, 1]):
                np.testing.assert_array_equal(batch[member], batches.draw(rows, BATCH, seed, step))


def test_the_chain_covers_all_batches_in_order_and_continues_from_anywhere(rows: batches.Windows) -> None:
    read = list(batches.ensemble(rows, BATCH, [1, 2], 0, 4))

    def follow(some: Sequence[batches.Batch], chain: Sequence[str] = ("", "")) -> list[str]:
        return functools.reduce(batches.chain, some, list(chain))

    whole = follow(read)
    assert whole == follow(read[2:], follow(read[:2])), "in two parts"
    assert whole != follow([read[1], read[0], *read[2:]]), "in another order"
    assert len(set(whole)) == 2 and all(len(link) == 64 for link in whole)


def test_the_order_is_that_of_the_archived_results(rows: batches.Windows) -> None:
    """A new Grain that shuffled differently would silently train every archived seed on other data. No archived run saw
    a second epoch."""
    drawn = np.concatenate([batches.draw(rows, BATCH, 0, step) for step in range(6)])
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "0b8111bb395d3a5c"


def test_validation_rows_are_fixed_and_spread_over_the_whole_text(rows: batches.Windows) -> None:
    chosen = batches.spread(rows, 5)
    np.testing.assert_array_equal(chosen, batches.spread(rows, 5))
    assert chosen[0] == 0 and chosen[-1] == 19


@pytest.mark.parametrize("sizes", [[1] * 40, [81], [3, 1, 30, 1, 1, 2, 20, 7, 9], [4] * 20])
def test_the_document_of_each_token(sizes: list[int]) -> None:
    """Documents of these sizes, each ended by separator 0; the definition, written out."""
    text = np.concatenate([np.append(np.ones(size, np.uint16), np.uint16(0)) for size in sizes])
    document = np.repeat(np.arange(len(sizes)), np.array(sizes) + 1)
    windows = batches.Windows(text, LENGTH)
    every, last = range(len(windows)), len(windows) - 1
    for numbers in map(np.array, ([*every], [0, 1, 5, last], *([row] for row in every))):
        expected = np.stack([document[row * LENGTH : row * LENGTH + LENGTH + 1] for row in numbers.tolist()])
        found = windows.documents(numbers, separator=0)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


def test_validation_documents_of_a_text(make: Callable[..., data.Data], text: Path, tmp_path: Path) -> None:
    one = make(f"text:{text}", validation_rows=8)
    assert one.validation_documents.shape == (8, 17) and not one.validation_documents.any()
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(f"{i} squared is {i * i}.")
    many = make(f"text:{tmp_path}", validation_rows=8)
    found = many.validation_documents
    assert found.max() > 8
    np.testing.assert_array_equal(np.diff(found, axis=1), many.validation[:, :-1] == 256)


def test_data_serves_batches_and_facts(make: Callable[..., data.Data], text: Path) -> None:
    made = make(f"text:{text}", batch=4, validation_rows=8)
    for step, batch in zip(range(2, 5), made.batches([3, 4], 2, 5), strict=True):
        np.testing.assert_array_equal(batch.rows[1], batches.draw(made.train, 4, 4, step))
    assert made.vocabulary == 257 and made.validation.shape == (8, 17)
    assert 0.99 < made.bytes_per_token < 1
