"""8 bit floats, which numpy lacks: types of their own that hold the codes, and the number of each code."""
from __future__ import annotations

import functools

import numpy as np

# E8M0 holds powers of two alone: the scales of blocks in the MX formats.
F8_E4M3, F8_E5M2, F8_E8M0 = (np.dtype([(name, "u1")]) for name in ("f8_e4m3", "f8_e5m2", "f8_e8m0"))
FLOAT8 = (F8_E4M3, F8_E5M2, F8_E8M0)


@functools.cache
def float8_values(dtype: np.dtype) -> np.ndarray:
    """Return the number of each of the 256 codes of an 8 bit float.

    E4M3 has no infinity, and NaN where all bits but the sign are set; E5M2 has both, as IEEE 754 has them (Micikevicius
    et al., 2022, https://arxiv.org/abs/2209.05433). E8M0 is 2^(code - 127), 255 is NaN (the OCP MX specification 1.0).
    """
    codes = np.arange(256)
    if dtype == F8_E8M0:
        return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127)).astype(np.float32)
    digits, bias = (3, 7) if dtype == F8_E4M3 else (2, 15)
    exponent, mantissa = (codes & 0x7F) >> digits, codes & ((1 << digits) - 1)
    # Below the smallest exponent there is no leading one.
    values = np.ldexp(mantissa + np.where(exponent > 0, 1 << digits, 0.0), np.maximum(exponent, 1) - bias - digits)
    if dtype == F8_E4M3:
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(codes >= 128, -values, values).astype(np.float32)
