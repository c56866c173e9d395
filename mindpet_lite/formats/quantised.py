"""Weights in 8 or 4 bits, in numpy: int8 for each output, GGUF's Q8_0, and NormalFloat-4 with double quantisation.

Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E (NF4); the 8 bit type of its
second quantisation is the dynamic one of Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021,
https://arxiv.org/abs/2110.02861, section 1.3.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mindpet_lite.formats.rounding import compensated

KINDS = ("int8", "q8_0", "nf4")
# Weights with one scale, and (nf4) scales with one scale of their own.
Q8_BLOCK, NF4_BLOCK, SCALE_BLOCK = 32, 64, 256
# The values of appendix E: each takes as large a part of a normal distribution as the others, and 0 is one of them.
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                0.7229568362236023, 1.0], np.float32)
# Numbers that are computed at once: in parts of a few MB, which memory is found for again and again.
_AT_ONCE = 1 << 19

Tensors = dict[str, np.ndarray]


class Part(NamedTuple):
    """A tensor of a quantised weight: its type and shape."""

    dtype: str
    shape: tuple[int, ...]


def dynamic_values() -> np.ndarray:
    """Return the 256 values of the dynamic 8 bit type, in order.

    A sign, n leading zeros (0 to 6) that mean the power 10^-n, and 6 - n bits that cut [0.1, 1] into as many equal
    parts, of which the middles are values; besides 0 and 1.
    """
    found = [0.0, 1.0]
    for zeros in range(7):
        edges = np.linspace(0.1, 1, 2 ** (6 - zeros) + 1)
        middles = 10.0 ** -zeros * (edges[1:] + edges[:-1]) / 2
        found += [*middles, *-middles]
    return np.sort(found).astype(np.float32)


DYNAMIC = dynamic_values()


def parts_of(kind: str, shape: tuple[int, int]) -> dict[str, Part]:
    """Return the tensors that a weight (outputs, inputs) of this kind is made of, by what stands in its name's place.

    - int8: `weight` (outputs, inputs) int8 times `weight_scale` (outputs,) float32.
    - q8_0: `weight` (outputs, inputs) int8 times `weight_scale` (outputs, inputs / 32) float16, for 32 inputs each.
    - nf4: `weight` (blocks · 32,) uint8, two numbers to a byte, the first in the upper half; the weight is taken flat
      and filled up with zeros to blocks of 64. The largest size in a block is `weight_scale` (blocks,) uint8, a number
      of the dynamic type, times `weight_scale_scale` (blocks / 256,) float32, plus `weight_scale_mean` ().

    Each has `weight_error` (): the norm of what rounding changed over the norm of the weight.

    Raises:
        ValueError: the kind does not take this shape.
    """
    outputs, inputs = shape
    error = {"weight_error": Part("float32", ())}
    if kind == "int8":
        return {"weight": Part("int8", shape), "weight_scale": Part("float32", (outputs,)), **error}
    if kind == "q8_0":
        if inputs % Q8_BLOCK:
            raise ValueError(f"q8_0 has a scale for each {Q8_BLOCK} inputs, into which {inputs} cannot be cut: take "
                             f"'int8', or leave the layer out.")
        return {"weight": Part("int8", shape), "weight_scale": Part("float16", (outputs, inputs // Q8_BLOCK)), **error}
    blocks = -(-outputs * inputs // NF4_BLOCK)
    return {"weight": Part("uint8", (blocks * NF4_BLOCK // 2,)), "weight_scale": Part("uint8", (blocks,)),
            "weight_scale_scale": Part("float32", (-(-blocks // SCALE_BLOCK),)),
            "weight_scale_mean": Part("float32", ()), **error}


def quantise(kind: str, weight: np.ndarray, gram: np.ndarray | None = None) -> Tensors:
    """Return the tensors of `parts_of` for a weight (outputs, inputs) of finite numbers.

    Args:
        kind: one of `KINDS`.
        weight: (outputs, inputs).
        gram: Xᵀ X (inputs, inputs) for rows X that the layer is given: codes are those that change what it gives least
            (`mindpet_lite.formats.rounding`); scales stay what they are without it. Default: the nearest codes.

    Raises:
        ValueError: the kind does not take this shape; or a scale would not be finite.
    """
    shape = weight.shape
    parts = parts_of(kind, (shape[0], shape[1]))
    found = {"int8": _to_int8, "q8_0": _to_q8_0, "nf4": _to_nf4}[kind](weight)
    if not all(np.isfinite(value).all() for value in found.values()):
        raise ValueError(f"its numbers are too large for the scales of {kind}.")
    if gram is not None:
        nearest = _nearest_nf4 if kind == "nf4" else _whole
        numbers = compensated(weight, _scale_of_each(kind, found, (shape[0], shape[1])), nearest, gram)
        found["weight"] = _nf4_codes(numbers) if kind == "nf4" else numbers.astype(np.int8)
    found["weight_error"] = np.array(_error(kind, weight, found), np.float32)
    return {name: np.ascontiguousarray(found[name], part.dtype).reshape(part.shape) for name, part in parts.items()}


def dequantise(kind: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return the weight (outputs, inputs) in float32 that tensors of `parts_of` mean."""
    return np.concatenate([_rows(kind, tensors, shape, first, last) for first, last in _steps(shape)])


def nf4_scales(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the largest size in each block, as its two quantisations leave it: (blocks,) float32."""
    scale = np.repeat(tensors["weight_scale_scale"].astype(np.float32), SCALE_BLOCK)[:tensors["weight_scale"].size]
    return DYNAMIC[tensors["weight_scale"]] * scale + np.float32(tensors["weight_scale_mean"])


def byte_values() -> np.ndarray:
    """Return the two numbers that each byte of an nf4 weight means: (256, 2) float32."""
    return np.stack([np.repeat(NF4, 16), np.tile(NF4, 16)], 1)


def _steps(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return rows that are computed at once, from and up to; each begins with a block of its own."""
    # Blocks begin with a row again after 64 rows at the latest.
    count = max(1, _AT_ONCE // max(1, shape[1]) // NF4_BLOCK) * NF4_BLOCK
    return [(first, min(first + count, shape[0])) for first in range(0, shape[0], count)]


def _rows(kind: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int], first: int, last: int) -> np.ndarray:
    """Return some rows of the weight."""
    if kind != "nf4":
        codes = tensors["weight"][first:last].astype(np.float32)
        scale = tensors["weight_scale"][first:last].astype(np.float32)
        return (codes.reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape)
    begin, end = first * shape[1], last * shape[1]
    blocks = slice(begin // NF4_BLOCK, -(-end // NF4_BLOCK))
    half = NF4_BLOCK // 2
    values = byte_values()[tensors["weight"][blocks.start * half:blocks.stop * half]].reshape(-1, NF4_BLOCK)
    values = values * nf4_scales(tensors)[blocks, None]
    return values.reshape(-1)[:end - begin].reshape(-1, shape[1])


def _error(kind: str, weight: np.ndarray, found: Mapping[str, np.ndarray]) -> float:
    """Return the norm of what rounding changed over the norm of the weight."""
    lost, whole = 0.0, 0.0
    shape = (weight.shape[0], weight.shape[1])
    for first, last in _steps(shape):
        own = weight[first:last].astype(np.float32)
        rounded = _rows(kind, found, shape, first, last)
        lost += float(np.square(own - rounded, dtype=np.float64).sum())
        whole += float(np.square(own, dtype=np.float64).sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def _to_int8(weight: np.ndarray) -> Tensors:
    scale = np.abs(weight).max(axis=1).astype(np.float32) / np.float32(127)
    return {"weight": _codes(weight, scale[:, None]), "weight_scale": scale}


def _to_q8_0(weight: np.ndarray) -> Tensors:
    outputs = weight.shape[0]
    blocks = weight.reshape(outputs, -1, Q8_BLOCK)
    with np.errstate(over="ignore"):
        scale = (np.abs(blocks).max(axis=2).astype(np.float32) / np.float32(127)).astype(np.float16)
    # Of the scale as it is kept, so that rounding it costs nothing more.
    codes = _codes(blocks, scale.astype(np.float32)[..., None])
    return {"weight": codes.reshape(weight.shape), "weight_scale": scale}


def _scale_of_each(kind: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return the scale of each number: float32 of the weight's shape."""
    if kind == "nf4":
        return np.repeat(nf4_scales(tensors), NF4_BLOCK)[:shape[0] * shape[1]].reshape(shape)
    scale = tensors["weight_scale"].astype(np.float32).reshape(shape[0], -1)
    return np.repeat(scale, shape[1] // scale.shape[1], axis=1)


def _whole(numbers: np.ndarray) -> np.ndarray:
    """Return the nearest whole numbers that an int8 code means."""
    return np.clip(np.rint(numbers), -127, 127)


def _nearest_nf4(numbers: np.ndarray) -> np.ndarray:
    """Return the nearest numbers of NormalFloat-4."""
    return NF4[_nearest(NF4, numbers)]


def _nf4_codes(numbers: np.ndarray) -> np.ndarray:
    """Return the bytes for numbers over their scale, taken flat: two to a byte, filled up with zeros."""
    flat = numbers.reshape(-1)
    pairs = _nearest(NF4, np.pad(flat, (0, -flat.size % NF4_BLOCK))).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def _codes(numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return numbers over their scale, rounded to whole numbers from -127 to 127; 0 where the scale is."""
    found = np.empty(numbers.shape, np.int8)
    step = max(1, _AT_ONCE // max(1, numbers[0].size))
    for first in range(0, len(numbers), step):
        part = scale[first:first + step]
        with np.errstate(over="ignore", invalid="ignore"):
            own = numbers[first:first + step].astype(np.float32) / np.where(part == 0, np.float32(1), part)
        found[first:first + step] = _whole(np.nan_to_num(own))
    return found


def _to_nf4(weight: np.ndarray) -> Tensors:
    size = -(-weight.size // NF4_BLOCK) * NF4_BLOCK
    codes, scales = np.empty(size // 2, np.uint8), np.empty(size // NF4_BLOCK, np.float32)
    flat = weight.reshape(-1)
    for first in range(0, size, _AT_ONCE):
        part = flat[first:first + _AT_ONCE].astype(np.float32)
        blocks = np.pad(part, (0, -part.size % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
        largest = np.abs(blocks).max(axis=1)
        scales[first // NF4_BLOCK:first // NF4_BLOCK + len(blocks)] = largest
        bytes_ = _nf4_codes(blocks / np.where(largest == 0, np.float32(1), largest)[:, None])
        codes[first // 2:first // 2 + len(bytes_)] = bytes_
    # The scales are all above 0: less their mean they use both signs.
    mean = np.float32(scales.mean(dtype=np.float64))
    groups = np.pad(scales - mean, (0, -scales.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    largest = np.abs(groups).max(axis=1)
    second = _nearest(DYNAMIC, groups / np.where(largest == 0, np.float32(1), largest)[:, None])
    return {"weight": codes, "weight_scale": second.reshape(-1)[:scales.size], "weight_scale_scale": largest,
            "weight_scale_mean": mean}


def _nearest(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the place of the nearest of some values in order for each number."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, numbers).astype(np.uint8)
