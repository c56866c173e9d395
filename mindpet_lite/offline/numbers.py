"""Stored numbers as float32, and float32 rounded once to what a file stores."""
from __future__ import annotations

import threading

import numpy as np

from mindpet_lite.formats.files import BF16, as_float, type_name

FLOATS = (np.dtype("<f4"), np.dtype("<f2"), BF16, np.dtype("<f8"))
# From here on rounding gives infinity: half a step above the largest number.
_LIMITS = {BF16: 2.0 ** 128 - 2.0 ** 119, np.dtype("<f2"): 65520.0, np.dtype("<f4"): 2.0 ** 128 - 2.0 ** 103,
           np.dtype("<f8"): np.inf}
# Bits of float32, and its exponent of the smallest float16 that has all its digits, 2^-14.
_SIGN, _EXPONENT, _MANTISSA_BITS, _SMALL = 0x80000000, 0x7F800000, 23, 113
# Between the exponents of float16 and float32.
_BIAS = np.float32(2.0 ** 112)


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
    bits = wide.view(np.uint32)
    if value.dtype == BF16:
        # bfloat16 is the upper half of a float32.
        np.copyto(bits, value.view("<u2"))
        np.left_shift(bits, 16, out=bits)
    elif value.view("<i2").max(initial=0) < 0x7C00 and value.view("<u2").max(initial=0) < 0xFC00:
        # The digits and the exponent to their places, and the sign, which copying repeats above them. Faster than numpy
        # converts.
        np.copyto(wide.view(np.int32), value.view("<i2"))
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, 0x8FFFFFFF, out=bits)
        np.multiply(wide, _BIAS, out=wide)
    else:
        wide[...] = value
    return wide


def store(value: np.ndarray, place: np.ndarray, scratch: Scratch) -> None:
    """Round values to the type of `place`, to nearest and ties to even, and write them there.

    Args:
        value: a matrix of float32 or float64; its memory is used up.
        place: where they go.
        scratch: memory.

    Raises:
        ValueError: a value is NaN or infinite, or becomes so in that type.
    """
    if place.dtype == BF16:
        value = value.astype(np.float32, copy=False)
    limit = _LIMITS[place.dtype]
    with np.errstate(invalid="ignore"):
        finite = -limit < float(value.min(initial=0)) and float(value.max(initial=0)) < limit
    if not finite:
        raise ValueError(f"it would hold NaN or infinite values: the base or the adapter does, or the sum is too large "
                         f"for {type_name(place.dtype)}.")
    if place.dtype == BF16:
        _store_bfloat16(value.view(np.uint32), place.view("<u2"), scratch)
    elif place.dtype == np.float16 and value.dtype == np.float32:
        _store_float16(value, place.view("<u2"), scratch)
    else:
        place[...] = value


def _store_bfloat16(bits: np.ndarray, place: np.ndarray, scratch: Scratch) -> None:
    """Round as `store` does: half a step is added and the lower half dropped; then ties, which are rare, made even."""
    low = scratch.array("low", bits.shape, np.uint16)
    # What is carried goes into the exponent, as it should.
    np.add(bits, 0x8000, out=bits)
    np.copyto(low, bits, casting="unsafe")
    np.right_shift(bits, 16, out=bits)
    np.copyto(place, bits, casting="unsafe")
    rows = np.flatnonzero(low.min(1, initial=1) == 0)
    even = place[rows]
    even[low[rows] == 0] &= 0xFFFE
    place[rows] = even


def _store_float16(value: np.ndarray, place: np.ndarray, scratch: Scratch) -> None:
    """Round as `store` does, faster than numpy converts."""
    bits, sign = value.view(np.uint32), scratch.array("sign", value.shape, np.uint32)
    np.bitwise_and(bits, _SIGN, out=sign)
    np.bitwise_xor(bits, sign, out=bits)
    # Beside 1.5 · 2^13 times its own power of two, float32 has as many digits left for a number as float16.
    large = scratch.array("large", value.shape, np.uint32)
    np.bitwise_and(bits, _EXPONENT, out=large)
    np.maximum(large, _SMALL << _MANTISSA_BITS, out=large)
    np.add(large, (13 << _MANTISSA_BITS) + (1 << _MANTISSA_BITS - 1), out=large)
    np.add(value, large.view(np.float32), out=value)
    np.subtract(value, large.view(np.float32), out=value)
    np.multiply(value, 1 / _BIAS, out=value)
    np.right_shift(bits, 13, out=bits)
    np.right_shift(sign, 16, out=sign)
    np.bitwise_or(bits, sign, out=bits)
    np.copyto(place, bits, casting="unsafe")


def rounded(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return values in another type; errors as `store`."""
    found = np.empty(value.shape, dtype)
    store(widened(value).reshape(1, -1), found.reshape(1, -1), Scratch())
    return found
