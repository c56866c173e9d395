"""What an adapter makes of one tensor of the base."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from mindpet_lite.offline.numbers import Scratch, store, widen, widened

# Numbers in a block of rows: few enough for a processor's cache, enough for Python.
_BLOCK = 1 << 19
# OpenBLAS computes products of at most so many multiplications, and those with a vector of at most so many, in the
# thread that asks; for larger ones its own threads get in the way of ours.
_PRODUCT, _VECTOR = 1 << 18, 1 << 13
_TILE = 64
_SCRATCH = Scratch()
# Takes rows of a tensor, flattened to a matrix, and the number of the first; changes them in place. Raises ValueError
# where a new value would not be finite.
Fill = Callable[[np.ndarray, int], None]
Whole = Callable[[], np.ndarray]


class Change(Protocol):
    """A new value for a tensor of the base, in the type that it has."""

    def start(self, whole: Whole) -> Fill:
        """Return what changes the rows of a tensor, in any order and in any thread; `whole` reads the tensor."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA: W + L R on the weight as the file has it, flattened to rows; with DoRA then scaled.

    Added in float32 (float64 where the base is) and rounded once. DoRA (Liu et al., 2024,
    https://arxiv.org/abs/2402.09353) scales each output's weights to the magnitude m: W' = m · V / ||V|| with
    V = W + L R, and W' = V where V is zero.

    Args:
        left: L (rows, rank), with the adapter's scale.
        right: R (rank, columns).
        magnitude: m, one number for each output; None without DoRA.
        outputs_in_rows: an output's weights are a row, else (embeddings, transposed layers) a column.
        residual: gives what the initialisation took out of the base, as L and R, from W.
    """

    left: np.ndarray
    right: np.ndarray
    magnitude: np.ndarray | None = None
    outputs_in_rows: bool = True
    residual: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None

    def start(self, whole: Whole) -> Fill:
        """Return what adds the update; see `Change`."""
        left, right, factor = self.left, self.right, None
        if self.residual is not None:
            weight = whole()
            taken, basis = self.residual(widened(weight.reshape(weight.shape[0], -1)))
            left, right = np.concatenate([-taken, left], axis=1), np.concatenate([basis, right])
        if self.magnitude is not None and not self.outputs_in_rows:
            weight = whole()
            squares = np.zeros(weight.shape[1])
            for begin, rows in blocks(weight):
                squares += np.square(_sum(rows, left[begin:begin + len(rows)], right), dtype=np.float64).sum(0)
            factor = _dora_factor(self.magnitude, squares).astype(np.float32)

        def fill(rows: np.ndarray, first: int) -> None:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                for begin, part in blocks(rows):
                    own = slice(first + begin, first + begin + len(part))
                    value = _sum(part, left[own], right)
                    if factor is not None:
                        value *= factor
                    elif self.magnitude is not None:
                        squares = np.square(value, dtype=np.float64).sum(1)
                        value *= _dora_factor(self.magnitude[own], squares)[:, None].astype(value.dtype)
                    store(value, part, _SCRATCH)
        return fill


@dataclasses.dataclass(frozen=True)
class Added:
    """A sum, such as of a bias and the bias of B."""

    update: np.ndarray

    def start(self, whole: Whole) -> Fill:
        """Return what adds the update; see `Change`."""
        update = self.update.reshape(len(self.update), -1)
        return lambda rows, first: store(widen(rows, _SCRATCH) + update[first:first + len(rows)], rows, _SCRATCH)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A parameter that trained beside the deltas, or rows of one.

    Args:
        value: of the parameter, or of its rows.
        rows: their numbers; None for all.
    """

    value: np.ndarray
    rows: Sequence[int] | None = None

    def start(self, whole: Whole) -> Fill:
        """Return what puts the trained values in; see `Change`."""
        value = self.value.reshape(self.value.shape[0] if self.value.ndim else 1, -1)

        def fill(rows: np.ndarray, first: int) -> None:
            if self.rows is None and value.dtype == rows.dtype:
                rows[...] = value[first:first + len(rows)]
            elif self.rows is None:
                store(widened(value[first:first + len(rows)]), rows, _SCRATCH)
            for number, row in enumerate(self.rows or ()):
                if first <= row < first + len(rows):
                    store(widened(value[number:number + 1]), rows[row - first:row - first + 1], _SCRATCH)
        return fill


@dataclasses.dataclass(frozen=True)
class Chain:
    """Several changes of one tensor, one after the other."""

    changes: tuple[Change, ...]

    def start(self, whole: Whole) -> Fill:
        """Return what makes all changes; see `Change`."""
        fills: list[Fill] = []

        def so_far() -> np.ndarray:
            weight = whole()
            for one in fills:
                one(weight.reshape(len(weight), -1), 0)
            return weight

        for change in self.changes:
            fills.append(change.start(so_far))

        def fill(rows: np.ndarray, first: int) -> None:
            for one in fills:
                one(rows, first)
        return fill


def _dora_factor(magnitude: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return m / ||V|| from the sums of squares, in float64, where no square of a float32 vanishes; 1 where V is 0."""
    is_zero = squares == 0
    return np.where(is_zero, 1, magnitude / np.sqrt(np.where(is_zero, 1, squares)))


def _sum(rows: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return rows + L R in float32 or float64: in the rows where they are that, else in memory that is used again."""
    update = _SCRATCH.array("update", rows.shape, np.float32)
    rank = len(right)
    columns = max(1, min(_PRODUCT // min(len(left), _TILE), _VECTOR) // rank)
    for own, height in _tiles(len(left), _TILE):
        for part, width in _tiles(right.shape[1], columns):
            out = update[own, part]
            # One call for all tiles.
            np.matmul(left[own].reshape(-1, 1, height, rank), right[:, part].reshape(rank, -1, width).swapaxes(0, 1),
                      out=out.reshape(len(out) // height, height, -1, width).swapaxes(1, 2))
    wide = widen(rows, _SCRATCH)
    return np.add(wide, update, out=wide)


def _tiles(count: int, size: int) -> Iterator[tuple[slice, int]]:
    """Yield what can be cut into pieces of this size, and what is left as one piece, with the size of the pieces."""
    whole = count - count % size
    if whole:
        yield slice(0, whole), size
    if whole < count:
        yield slice(whole, count), count - whole


def blocks(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of rows and the number of the first of each."""
    rows = rows.reshape(len(rows), -1)
    step = even_step(len(rows), _BLOCK // max(1, rows.shape[1]))
    for begin in range(0, len(rows), step):
        yield begin, rows[begin:begin + step]


def even_step(count: int, most: int) -> int:
    """Return how many of `count` to take at a time, at most so many or one, lest few be left for the last time."""
    return max(1, -(-count // max(1, -(-count // max(1, most)))))
