"""Batches are a pure function of (seed, step)."""

import functools
import hashlib

import numpy as np
import pytest

from rope_lm import data
from rope_lm.data import batches

LENGTH, BATCH = 4, 3


@pytest.fixture(scope="module")
def rows():
    return batches.Rows(np.arange(20 * LENGTH + 2, dtype=np.uint16), LENGTH)  # 20 rows and a rest


def test_rows_overlap_by_one_token_so_that_each_is_a_target_once(rows):
    assert len(rows) == 20
    targets = rows[np.arange(20)][:, 1:]
    np.testing.assert_array_equal(targets.ravel(), np.arange(1, 20 * LENGTH + 1))


def test_each_row_comes_once_in_an_epoch_in_another_order_each_time(rows):
    made = batches.Order(rows, BATCH, seed=0)
    drawn = np.concatenate([made[step][:, 0] // LENGTH for step in range(40)])[: 5 * 20]
    epochs = drawn[:100].reshape(5, 20)
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_no_seed_has_an_epoch_of_another(rows):
    drawn = [np.concatenate([batches.Order(rows, BATCH, seed)[step][:, 0] for step in range(20)]) for seed in range(6)]
    assert len({tuple(epoch) for each in drawn for epoch in each.reshape(3, 20)}) == 18


def test_a_batch_hangs_on_seed_and_step_alone(rows):
    first, second = batches.Order(rows, BATCH, seed=7), batches.Order(rows, BATCH, seed=7)
    np.testing.assert_array_equal(first[11], [*map(second.__getitem__, (3, 11))][1])
    assert (batches.Order(rows, BATCH, seed=8)[11] != first[11]).any()


def test_reading_ahead_gives_the_same_batches_from_any_start(rows):
    members = [batches.Order(rows, BATCH, seed) for seed in (1, 2)]
    for start in (0, 5):
        for step, made in zip(range(start, 9), batches.ensemble([*members, members[0]], start, 9), strict=True):
            batch, digests = made
            assert digests[0] == digests[2] == hashlib.sha256(batch[0].astype("<i4").tobytes()).digest() != digests[1]
            assert batch.shape == (3, BATCH, LENGTH + 1) and batch.dtype == np.int32
            np.testing.assert_array_equal(batch[0], members[0][step])
            np.testing.assert_array_equal(batch[1], members[1][step])
            np.testing.assert_array_equal(batch[2], batch[0])


def test_the_chain_is_of_all_batches_in_order_and_goes_on_from_anywhere(rows):
    made = list(batches.ensemble([batches.Order(rows, BATCH, seed) for seed in (1, 2)], 0, 4))
    follow = lambda some, chain=("", ""): functools.reduce(batches.chain, some, chain)  # noqa: E731
    whole = follow(made)
    assert whole == follow(made[2:], follow(made[:2])), "in two parts"
    assert whole != follow([made[1], made[0], *made[2:]]), "in another order"
    assert len(set(whole)) == 2 and all(len(each) == 64 for each in whole)


def test_the_order_is_the_one_that_archived_results_were_made_with(rows):
    """A new Grain that shuffles otherwise would silently train every archived seed on other data. None of them saw a
    second epoch."""
    made = batches.Order(rows, BATCH, seed=0)
    digest = hashlib.sha256(np.concatenate([made[step] for step in range(6)]).tobytes()).hexdigest()
    assert digest[:16] == "0b8111bb395d3a5c"


def test_validation_rows_are_fixed_and_spread_over_the_whole_text(rows):
    chosen = batches.spread(rows, 5)
    np.testing.assert_array_equal(chosen, batches.spread(rows, 5))
    assert chosen[0, 0] == 0 and chosen[-1, 0] == 19 * LENGTH


def test_data_serves_both_ways_the_same(text, cache):
    made = data.make(f"text:{text}", "bytes", 16, 4, 8, cache, "", "")
    ahead = list(made.batches([3, 4], 2, 5))
    np.testing.assert_array_equal(ahead[1].rows[1], made.batch_of(4, 3))
    assert made.vocabulary == 257 and made.validation.shape == (8, 17)
    assert 0.99 < made.bytes_per_token < 1
