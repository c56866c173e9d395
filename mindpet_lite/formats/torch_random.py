"""The numbers that PyTorch gives from a seed: PEFT keeps only the seed of some frozen matrices (VeRA, RandLoRA, ...).

They are those of PyTorch 2.13 on an x86 processor with AVX2, bit for bit, for contiguous tensors. Every number comes
from the 32 bit words of one Mersenne Twister, so each call goes on where the one before it stopped.

On an x86 processor without AVX2 PyTorch's own last bits are others: there it rounds products before it adds, and takes
logarithm, sine and cosine from the system.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from mindpet_lite.formats.torch_arithmetic import BLOCK, box_muller, fused, rounded

# Arrays are worked on in pieces that stay in the processor's cache.
_PIECE = 1 << 15
# From this range on, randint takes 64 bits for a number.
_WIDE_RANGE = 1 << 28
# From this length on, randperm takes 64 bits for a number, and another way.
_LONG_PERMUTATION = (2 ** 32 - 1) // 20
# randperm swaps this many numbers at once.
_SWAPS = 512
_TYPES = ("float32", "bfloat16")


class TorchGenerator:
    """The CPU generator of PyTorch, `torch.Generator().manual_seed(seed)`.

    Args:
        seed: any that PyTorch takes; its lowest 32 bits count.

    Raises:
        ValueError: the seed is not between -2^63 and 2^64 - 1.
    """

    def __init__(self, seed: int) -> None:
        if not -2 ** 63 <= seed < 2 ** 64:
            raise ValueError(f"seed must be an integer from -2^63 to 2^64 - 1, as PyTorch's are, but is {seed}.")
        # numpy's older interface starts the Mersenne Twister from 32 bits as its authors did, and so does PyTorch.
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def rand(self, *shape: int) -> np.ndarray:
        """Return numbers from [0, 1) as `torch.rand` does: multiples of 2^-24 in float32."""
        return self.uniform(shape, 0, 1)

    def uniform(self, shape: Sequence[int], low: float, high: float, dtype: str = "float32") -> np.ndarray:
        """Return numbers from [low, high) as `Tensor.uniform_` does: low + (high - low)·u, u from [0, 1).

        PyTorch takes u from the lowest 24 bits of a word. It computes in float32, and rounds once. Then it rounds to
        the type. A number that became `high` is replaced by `low`.

        Args:
            shape: the shape of the tensor.
            low: the smallest number.
            high: the bound above all numbers.
            dtype: the type of the tensor, float32 or bfloat16 (RandLoRA's).

        Returns:
            The numbers in float32, which holds those of bfloat16 too.

        Raises:
            ValueError: `low` is above `high`, or float32 cannot hold their difference, or the type is another.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            start, end = np.float32(low), np.float32(high)
            span = end - start
        if not (low <= high and np.isfinite(span)):
            raise ValueError(f"low <= high is wanted, and a difference that float32 can hold, but low is {low} and "
                             f"high is {high}.")
        if dtype not in _TYPES:
            raise ValueError(f"dtype must be {' or '.join(_TYPES)}, but is {dtype!r}.")
        lowest, highest = rounded(np.array([start, end]), dtype)
        values = np.empty(math.prod(shape), np.float32)
        for piece in _pieces(values):
            numbers = rounded(fused(self._fractions(len(piece)), span, start), dtype)
            piece[:] = np.where(numbers == highest, lowest, numbers)
        return values.reshape(shape)

    def kaiming_uniform(self, shape: Sequence[int], a: float = 0, dtype: str = "float32") -> np.ndarray:
        """Return numbers from [-b, b) as `torch.nn.init.kaiming_uniform_`, b = sqrt(3)·sqrt(2 / (1 + a²)) / sqrt(n).

        n is the number of inputs of an output: the product of all axes but the first. With a = 0 these are the numbers
        of PEFT's own function for VeRA.

        Args:
            shape: the shape of the tensor, of two axes or more.
            a: the negative slope of the leaky ReLU that the layer is taken to have.
            dtype: as for `uniform`.

        Raises:
            ValueError: `shape` has fewer than two axes, or as `uniform`.
        """
        if len(shape) < 2:
            raise ValueError(f"a shape of two axes or more is wanted, but it is {tuple(shape)}.")
        if 0 in shape:
            return np.empty(shape, np.float32)
        bound = math.sqrt(3) * (math.sqrt(2 / (1 + a ** 2)) / math.sqrt(math.prod(shape[1:])))
        return self.uniform(shape, -bound, bound, dtype)

    def randn(self, *shape: int) -> np.ndarray:
        """Return normal numbers of mean 0 and standard deviation 1 as `torch.randn` does, in float32."""
        return self.normal(shape, 0, 1)

    def normal(self, shape: Sequence[int], mean: float, std: float) -> np.ndarray:
        """Return normal numbers as `Tensor.normal_` does, in float32: mean + std·z, z after Box and Muller (1958).

        z = sqrt(-2 ln v)·cos(2 pi w) and z' = sqrt(-2 ln v)·sin(2 pi w), of v from (0, 1] and w from [0, 1).

        16 numbers or more are computed in blocks of 16, in float32. Where the last block is not full, PyTorch draws 16
        new words and computes the last 16 numbers from them, whatever block they were of.

        Fewer than 16 numbers are computed one by one, in float64. z' waits for the next number, in this call or in a
        later one for fewer than 16.

        Args:
            shape: the shape of the tensor.
            mean: the mean.
            std: the standard deviation.

        Raises:
            ValueError: `mean` or `std` is not finite, or `std` is negative.
        """
        if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
            raise ValueError(f"a finite mean and a finite std >= 0 are wanted, but mean is {mean} and std is {std}.")
        size = math.prod(shape)
        if size < BLOCK:
            values = np.array([self._single_normal(mean, std) for _ in range(size)], np.float32)
        else:
            values = self.rand(size)
            blocks = values[:size - size % BLOCK]
            for piece in _pieces(blocks):
                box_muller(piece, np.float32(mean), np.float32(std))
            if size % BLOCK:
                values[-BLOCK:] = self.rand(BLOCK)
                box_muller(values[-BLOCK:], np.float32(mean), np.float32(std))
        return values.reshape(shape)

    def randint(self, low: int, high: int, shape: Sequence[int]) -> np.ndarray:
        """Return integers from [low, high) as `torch.randint` does, in int64: low + word mod (high - low).

        From a range of 2^28 on, PyTorch takes 64 bits for a number, else 32.

        Args:
            low: the smallest integer.
            high: the bound above all integers.
            shape: the shape of the tensor.

        Raises:
            ValueError: `low` is not below `high`, or one of them is no int64.
        """
        if not -2 ** 63 <= low < high < 2 ** 63:
            raise ValueError(f"low < high is wanted, both within int64, but low is {low} and high is {high}.")
        size = math.prod(shape)
        words = self._wide_words(size) if high - low >= _WIDE_RANGE else self._words(size).astype(np.uint64)
        # Sums beyond 64 bits wrap around to the signed result.
        return (words % np.uint64(high - low) + np.uint64(low % 2 ** 64)).view(np.int64).reshape(shape)

    def randperm(self, n: int, count: int | None = None) -> np.ndarray:
        """Return the integers below n in the order that `torch.randperm` gives, in int64.

        PyTorch shuffles after Fisher and Yates: for every i, from 0 on, it swaps the numbers at i and at
        i + word mod (n - i). From n = 214,748,364 on it draws 64 bits and fills the places one by one: for every i, the
        number at j = word mod (i + 1) moves to place i, and i takes its place.

        Args:
            n: how many integers.
            count: how many of them to return, from the first on; all by default. Fewer take less time. The generator
                goes on from where it would with all.

        Raises:
            ValueError: `n` is negative, or `count` is not from 0 to n.
        """
        count = n if count is None else count
        if not 0 <= count <= n:
            raise ValueError(f"n >= 0 and a count from 0 to n are wanted, but n is {n} and count is {count}.")
        return self._long_permutation(n, count) if n >= _LONG_PERMUTATION else self._permutation(n, count)

    def _permutation(self, n: int, count: int) -> np.ndarray:
        words = self._words(max(n - 1, 0))[:count]
        places = np.arange(len(words))
        others = places + words % (n - places)
        values = np.arange(n)
        # Step i changes nothing before i, so the first `count` steps are enough.
        for start in range(0, len(places), _SWAPS):
            _swap(values, start, others[start:start + _SWAPS])
        return values[:count].copy()

    def _long_permutation(self, n: int, count: int) -> np.ndarray:
        values = np.zeros(count, np.int64)
        view = values.data
        for start in range(0, n, _PIECE):
            places = np.arange(start, min(start + _PIECE, n))
            others = (self._wide_words(len(places)) % (places + 1).astype(np.uint64)).astype(np.int64)
            seen = np.flatnonzero(others < count)
            for place, other in zip(places[seen].tolist(), others[seen].tolist()):
                if place < count:
                    view[place] = view[other]
                view[other] = place
        return values

    def _words(self, size: int) -> np.ndarray:
        """Return the next 32 bit words of the Mersenne Twister."""
        return self._twister.randint(0, 2 ** 32, size, np.uint32)

    def _wide_words(self, size: int) -> np.ndarray:
        """Return the next 64 bit words: of two words, the first is the upper half."""
        upper, lower = self._words(2 * size).reshape(size, 2).astype(np.uint64).T
        return upper << np.uint64(32) | lower

    def _fractions(self, size: int) -> np.ndarray:
        """Return the next float32 from [0, 1)."""
        return (self._words(size) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2 ** -24)

    def _single_normal(self, mean: float, std: float) -> np.float32:
        if self._spare is None:
            turn, height = ((self._wide_words(2) & np.uint64(2 ** 53 - 1)) * 2.0 ** -53).tolist()
            radius, angle = math.sqrt(-2 * math.log1p(-height)), 2 * math.pi * turn
            value, self._spare = radius * math.cos(angle), radius * math.sin(angle)
        else:
            value, self._spare = self._spare, None
        # A fused multiply-add in float64; fractions are exact.
        return np.float32(float(Fraction(value) * Fraction(std) + Fraction(mean)))


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views of an array, one after the other."""
    return (values[start:start + _PIECE] for start in range(0, len(values), _PIECE))


def _swap(values: np.ndarray, start: int, others: np.ndarray) -> None:
    """Swap the values at start, start + 1, ... with those at other places, one pair after the other."""
    end = start + len(others)
    ordered = np.sort(others)
    if ordered[0] >= end and np.all(ordered[1:] != ordered[:-1]):
        # No place occurs twice: all at once.
        values[start:end], values[others] = values[others], values[start:end].copy()
        return
    view = values.data
    for place, other in enumerate(others.tolist(), start):
        view[place], view[other] = view[other], view[place]
