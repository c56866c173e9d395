"""The arithmetic of PyTorch's random numbers in float32, bit for bit; see `mindpet_lite.formats.torch_random`."""
from __future__ import annotations

import math

import numpy as np

# Normal numbers are computed in blocks of 16.
BLOCK = 16

# Cephes' approximations in float32 (logf, sinf, cosf; Moshier, https://www.netlib.org/cephes): the coefficients of the
# polynomials, highest power first, and ln 2 and pi/4 in parts whose products with small integers are exact, or nearly.
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_LN_2, _LN_2_REST = np.float32(0.693359375), np.float32(-2.12194440e-4)
_MINUS_QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
_ROOT_HALF, _FOUR_BY_PI, TWO_PI = np.float32(math.sqrt(0.5)), np.float32(4 / math.pi), np.float32(2 * math.pi)
_HALF, _ONE, _MINUS_TWO = np.float32(0.5), np.float32(1), np.float32(-2)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 to the nearest number of a type, halfway to the even one."""
    if dtype == "float32":
        return values
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)


def fused(x: np.ndarray, y: np.ndarray | np.float32, z: np.ndarray | np.float32) -> np.ndarray:
    """Return x·y + z of float32, rounded once, as the processor's fused multiply-add.

    float64 holds the product exactly, but not always the sum. Of the two neighbours of the exact sum, the one with an
    odd last bit is taken. Rounded to float32 it is what the exact sum is (Boldo and Melquiond, 2008,
    https://doi.org/10.1109/TC.2007.70819). The error of a sum is computed after Knuth (TwoSum).
    """
    product = np.multiply(x, y, dtype=np.float64)
    total = product + z
    added = total - product
    error = (product - (total - added)) + (z - added)
    wrong = (error != 0) & ((total.view(np.int64) & 1) == 0)
    total[wrong] = np.nextafter(total[wrong], np.copysign(np.inf, error[wrong]))
    return total.astype(np.float32)


def multiply_add(x: np.ndarray, y: np.ndarray | np.float32, z: np.ndarray | np.float32) -> np.ndarray:
    """Return x·y + z as `fused` does, in less time, where rounding to float64 first does no harm.

    It does none for any of the 2^24 arguments that `log` and `cosine_and_sine` can get.
    """
    return (np.multiply(x, y, dtype=np.float64) + z).astype(np.float32)


def polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Return a polynomial after Horner."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = multiply_add(value, x, np.float32(coefficient))
    return value


def log(x: np.ndarray) -> np.ndarray:
    """Return ln x of float32 from [2^-24, 1] as PyTorch's vector code does.

    x = 2^e·(1 + m) with m from [sqrt(1/2) - 1, sqrt(2) - 1); ln x = e ln 2 + m - m²/2 + m³·P(m).
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < _ROOT_HALF
    e = (exponent - low).astype(np.float32)
    m = np.where(low, mantissa - _ONE + mantissa, mantissa - _ONE)
    square = m * m
    rest = multiply_add(m * polynomial(m, _LOG), square, e * _LN_2_REST) - _HALF * square
    return multiply_add(e, _LN_2, m + rest)


def cosine_and_sine(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of float32 from [0, 2 pi) as PyTorch's vector code does.

    The nearest multiple of pi/2 is taken away. What is left is r from [-pi/4, pi/4], and sin r = r + r³·P(r²),
    cos r = 1 - r²/2 + r⁴·Q(r²). The quarter turns taken away tell which of them is the sine, and the signs.
    """
    quarters = ((angle * _FOUR_BY_PI).astype(np.int32) + 1) >> 1
    r = angle
    for part in _MINUS_QUARTER_PI:
        r = multiply_add((2 * quarters).astype(np.float32), np.float32(part), r)
    square = r * r
    sine = multiply_add(r, square * polynomial(square, _SINE), r)
    cosine = multiply_add(square, square * polynomial(square, _COSINE), -_HALF * square) + _ONE
    odd = (quarters & 1) == 1
    cosine, sine = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    return np.where((quarters + 1) & 2, -cosine, cosine), np.where(quarters & 2, -sine, sine)


def box_muller(values: np.ndarray, mean: np.float32, std: np.float32) -> None:
    """Turn uniform into normal numbers, in place: of a block, the first 8 give the radii, the last 8 the angles."""
    blocks = values.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(_MINUS_TWO * log(_ONE - blocks[:, 0]))
    cosine, sine = cosine_and_sine(TWO_PI * blocks[:, 1])
    blocks[:, 0] = fused(radius * cosine, std, mean)
    blocks[:, 1] = fused(radius * sine, std, mean)
