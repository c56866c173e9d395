"""Batches of rows: shuffled anew in every epoch, of one size, and known for any step."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mindpet_lite.arguments import check_int


class BatchSampler:
    r"""Endless batches of row numbers, which go on from any step.

    The batches are cut from one endless row of epochs, each a new shuffle of all rows: every row comes once in an
    epoch, and a batch that an epoch does not fill is filled from the next, so that shapes never change. The batch of a
    step follows from `seed` and the step alone. So a run that goes on at a step gets what it would have got.

    With several processes each gets its share of the same batch of `batch_size` x `ranks` rows: together they train
    on what one process with the batch size `batch_size` x `ranks` would.

    Args:
        count: number of rows; positive.
        batch_size: rows of a batch of this process; positive; may be more than `count`.
        seed: the same seed gives the same batches; 0 or more. Default: 0.
        rank: number of this process, from 0. Default: 0.
        ranks: number of processes; positive. Default: 1.

    Attributes:
        step: number of batches given so far; set it to go on from there.

    Raises:
        TypeError: an argument is no integer.
        ValueError: `count`, `batch_size` or `ranks` is below 1, `seed` is below 0, or `rank` is none of the processes'.

    Examples:
        >>> import mindpet_lite as mp
        >>> sampler = mp.BatchSampler(count=10, batch_size=4, seed=0)
        >>> for rows in sampler:                   # it never ends by itself
        ...     if sampler.step == 5:
        ...         break
        >>> len(rows)
        4
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        for name, value in (("count", count), ("batch_size", batch_size), ("ranks", ranks)):
            check_int(name, value)
        for name, value in (("seed", seed), ("rank", rank)):
            check_int(name, value, least=0)
        if rank >= ranks:
            raise ValueError(f"rank must be below ranks, but got rank {rank} of {ranks}.")
        self.count, self.batch_size, self.seed, self.rank, self.ranks = count, batch_size, seed, rank, ranks
        self.step = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """Return the row numbers of the next batch, int64 of shape (batch_size,)."""
        whole = self.batch_size * self.ranks
        start, stop = self.step * whole, (self.step + 1) * whole
        first, last = start // self.count, (stop - 1) // self.count
        orders = [np.random.default_rng([self.seed, epoch]).permutation(self.count) for epoch in range(first, last + 1)]
        self.step += 1
        rows = np.concatenate(orders)[start - first * self.count:stop - first * self.count]
        return rows[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]
