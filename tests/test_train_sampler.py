"""Batches of rows: every row once in an epoch, the same from any step, shares that make up the whole batch."""
from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from mindpet_lite.train import BatchSampler


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 1)])
def test_every_row_comes_once_in_an_epoch_and_batches_have_one_size(count, batch_size):
    batches = list(islice(BatchSampler(count, batch_size, seed=3), 3 * count))
    assert {rows.shape for rows in batches} == {(batch_size,)} and batches[0].dtype == np.int64
    epochs = np.concatenate(batches)[:3 * count].reshape(-1, count)
    assert all(np.array_equal(np.sort(epoch), np.arange(count)) for epoch in epochs)
    if count > 3:
        assert not np.array_equal(epochs[0], epochs[1])


def test_a_run_goes_on_at_any_step():
    whole = list(islice(BatchSampler(10, 4, seed=1), 9))
    for step in range(9):
        sampler = BatchSampler(10, 4, seed=1)
        sampler.step = step
        assert np.array_equal(next(sampler), whole[step]) and sampler.step == step + 1
    assert not np.array_equal(next(BatchSampler(10, 4, seed=2)), whole[0])


def test_the_processes_shares_are_one_batch_of_one_process():
    shares = [BatchSampler(10, 2, seed=5, rank=rank, ranks=3) for rank in range(3)]
    for rows in islice(BatchSampler(10, 6, seed=5), 7):
        assert np.array_equal(np.concatenate([next(share) for share in shares]), rows)


@pytest.mark.parametrize(("error", "arguments", "text"), [
    (ValueError, {"count": 0}, "count must be a positive int, but got 0"),
    (TypeError, {"batch_size": 2.0}, "batch_size must be a positive int, but got 2.0"),
    (ValueError, {"seed": -1}, "seed must be an int of at least 0, but got -1"),
    (ValueError, {"rank": 2, "ranks": 2}, "rank must be below ranks, but got rank 2 of 2"),
    (TypeError, {"rank": True}, "rank must be an int of at least 0, but got True")])
def test_arguments_that_make_no_sense_are_refused(error, arguments, text):
    with pytest.raises(error, match=text):
        BatchSampler(**{"count": 10, "batch_size": 2, **arguments})
