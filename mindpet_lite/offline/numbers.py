"""Stored numbers as float32, and float32 rounded once to what a file stores."""
from __future__ import annotations

import threading

import numpy as np

from mindpet_lite.formats.files import BF16, as_float, type_name

FLOATS = (np.dtype("<f4"), np.dtype("<f2"), BF16, np.dtype("<f8"))
# The bits that are all set in NaN and infinity.
_EXPONENTS = {BF16: 0x7F80, np.dtype("<f2"): 0x7C00}
# Each float16 as float32, by its bits: numpy looks them up faster than it converts.
_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


class Scratch(threading.local):
    """Memory of a thread that is used again and again: new memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Return an array with whatever was left in it; the next of the same use takes its place."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if use not in self._memory or self._memory[use].size < size:
            self._memory[use] = np.empty(size, np.uint8)
        return self._memory[use][:size].view(dtype).reshape(shape)


def widened(value: np.ndarray) -> np.ndarray:
    """Return values as float32, and float64 as they are; in memory of their own."""
    value = as_float(value)
    return value.astype(np.float64 if value.dtype == np.float64 else np.float32)


def widen(value: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Return values as `widened` does, in `scratch`, or the values themselves where they are wide already."""
    if value.dtype in (np.float32, np.float64):
        return value
    wide = scratch.array("wide", value.shape, np.float32)
    if value.dtype == BF16:
        # bfloat16 is the upper half of a float32.
        np.left_shift(value.view("<u2"), 16, out=wide.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.take(_HALVES, value.view("<u2"), out=wide, mode="wrap")
    return wide


def store(value: np.ndarray, place: np.ndarray, scratch: Scratch) -> None:
    """Round values to the type of `place`, to nearest and ties to even, and write them there.

    Raises:
        ValueError: a value is NaN or infinite, or becomes so in that type.
    """
    if place.dtype == BF16:
        bits, odd = value.astype(np.float32, copy=False).view(np.uint32), scratch.array("odd", value.shape, np.uint32)
        np.right_shift(bits, 16, out=odd)
        np.bitwise_and(odd, 1, out=odd)
        np.add(odd, 0x7FFF, out=odd)
        # What is carried goes into the exponent, as it should. A NaN stays one: that of a bfloat16, or of an operation,
        # has zeros in its lower half.
        np.add(odd, bits, out=odd)
        np.right_shift(odd, 16, out=place.view("<u2"), casting="unsafe")
    else:
        with np.errstate(over="ignore"):
            place[...] = value
    if place.dtype in _EXPONENTS:
        bits = np.bitwise_and(place.view("<u2"), _EXPONENTS[place.dtype], out=scratch.array(
            "bits", place.shape, np.uint16))
        finite = bits.max(initial=0) < _EXPONENTS[place.dtype]
    else:
        finite = np.isfinite(place, out=scratch.array("finite", place.shape, np.bool_)).all()
    if not finite:
        raise ValueError(f"it would hold NaN or infinite values: the base or the adapter does, or the sum is too large "
                         f"for {type_name(place.dtype)}.")


def rounded(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return values in another type; errors as `store`."""
    found = np.empty(value.shape, dtype)
    store(widened(value), found, Scratch())
    return found
