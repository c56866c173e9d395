"""Weights in 8 bit floats, which a scale belongs to."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mindpet_lite.formats.files import type_name
from mindpet_lite.formats.float8 import F8_E4M3, F8_E5M2, F8_E8M0, float8_values
from mindpet_lite.offline.base import Base
from mindpet_lite.offline.changes import Change, Fill, Whole, blocks
from mindpet_lite.offline.model_config import scale_block
from mindpet_lite.offline.numbers import FLOATS, rounded, widened

# What the scale of a weight is called beside it: by DeepSeek, by compressed-tensors and FBGEMM, by ComfyUI.
SCALES = ("weight_scale_inv", "weight_scale", "scale_weight")
# Rows and columns of a block with one number of the scale, where the config does not say.
_BLOCK = (128, 128)
# Up to here numbers are rounded to the largest one, 448 and 57344.
_LIMITS = {F8_E4M3: 464.0, F8_E5M2: 61440.0}


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the numbers of a weight are multiplied with.

    Args:
        name: of its tensor in the base.
        values: one for each block, a matrix in float32.
        block: rows and columns of a block; those at the ends may be smaller.
    """

    name: str
    values: np.ndarray
    block: tuple[int, int]

    def of_rows(self, first: int, rows: int, columns: int) -> np.ndarray:
        """Return the number for each value of some rows of the weight."""
        own = self.values[np.arange(first, first + rows) // self.block[0]]
        return own if own.shape[1] == 1 else np.repeat(own, self.block[1], axis=1)[:, :columns]


@dataclasses.dataclass(frozen=True)
class Requantised:
    """A change of a weight in float8: made in float32 on float8 times scale, then rounded to float8 again.

    Args:
        inner: the change of the weight in float32.
        scale: of the weight as it was.
        new: of the changed weight.
        of_weight: the norm of what rounding changes over that of the changed weight.
        of_update: the same over the norm of the update.
    """

    inner: Change
    scale: Scale
    new: Scale
    of_weight: float = 0.0
    of_update: float = 0.0

    def start(self, whole: Whole) -> Fill:
        """Return what makes the change; see `changes.Change`."""
        inner = _in_float32(self.inner, self.scale, whole)

        def fill(rows: np.ndarray, first: int) -> None:
            value = inner(rows, first)
            rows[...] = encode(value / self.new.of_rows(first, *value.shape), rows.dtype)
        return fill


def encode(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return values in float8, rounded to nearest and ties to even; above the largest number, that number."""
    numbers = float8_values(dtype)[:128]
    numbers = numbers[np.isfinite(numbers)]
    middles = (numbers[1:] + numbers[:-1]) / 2
    size = np.abs(value)
    codes = np.searchsorted(middles, size)
    # Ties come out at the lower number here.
    tie = middles[np.minimum(codes, len(middles) - 1)] == size
    codes = np.where(tie & (codes % 2 == 1), codes + 1, codes)
    return (codes + 128 * np.signbit(value)).astype(np.uint8).view(dtype)


def find_scale(weight: str, base: Base) -> Scale:
    """Return the scale of a weight in float8.

    Raises:
        ValueError: there is none, or its shape or its values are none of a scale's.
    """
    kind, layer = type_name(base.dtype(weight)), weight.rpartition(".")[0]
    own = base.owners[layer]
    found = [own[name] for name in SCALES if name in own]
    if base.dtype(weight) not in _LIMITS:
        raise ValueError(f"{weight} is {kind}, which is no type of a weight.")
    if not found:
        others = sorted(set(own.values()) - {weight})
        raise ValueError(f"{weight} is {kind}, and its scale is not in the base (none of {', '.join(SCALES)} stands "
                         f"beside it{', only ' + ', '.join(others[:3]) if others else ''}), so that its values are "
                         f"not known: merge onto the base it was converted from, or add the scale.")
    name, shape = found[0], base.shape(weight)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    values = widened(base.read(name)).astype(np.float32)
    if base.dtype(name) not in (*FLOATS, F8_E8M0) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} must hold positive numbers, but is of type {type_name(base.dtype(name))} or holds "
                         f"others: the base is damaged, or quantised in a way that is not known.")
    if values.size == 1:
        return Scale(name, values.reshape(1, 1), (rows, columns))
    if values.shape in ((rows,), (rows, 1)):
        return Scale(name, values.reshape(rows, 1), (1, columns))
    block = scale_block(base.config) or _BLOCK
    if values.shape != (-(-rows // block[0]), -(-columns // block[1])):
        raise ValueError(f"{name} of shape {values.shape} is no scale for {weight} of shape {shape}: one number, one "
                         f"for each row, or one for each block of {block[0]} x {block[1]} is expected.")
    return Scale(name, values, block)


def requantised(weight: str, inner: Change, base: Base) -> tuple[Requantised, np.ndarray | None]:
    """Return a change of a weight in float8, and its new scale in the type and shape of the old one.

    A block whose values no longer fit gets its scale doubled until they do, which costs none of them a digit; all
    other scales stay, and where none changes None stands for the scale.

    Raises:
        ValueError: as `find_scale`; or a new value would not be finite.
    """
    scale, dtype = find_scale(weight, base), base.dtype(weight)
    codes = base.read(weight)
    codes = codes.reshape(len(codes), -1)
    changed = _in_float32(inner, scale, lambda: codes)
    size = np.zeros(scale.values.shape, np.float32)
    starts = np.arange(0, codes.shape[1], scale.block[1])
    for begin, rows in blocks(codes):
        largest = np.maximum.reduceat(np.abs(changed(rows, begin)), starts, axis=1)
        np.maximum.at(size, np.arange(begin, begin + len(rows)) // scale.block[0], largest)
    with np.errstate(divide="ignore"):
        doublings = np.ceil(np.log2(size / (scale.values * np.float32(_LIMITS[dtype])))).clip(0)
    new = dataclasses.replace(scale, values=np.ldexp(scale.values, doublings.astype(np.int32)))
    error = weights = updates = 0.0
    for begin, rows in blocks(codes):
        value = changed(rows, begin)
        factor = new.of_rows(begin, *value.shape)
        error += _square(value - widened(encode(value / factor, dtype)) * factor)
        updates += _square(value - widened(rows) * scale.of_rows(begin, *value.shape))
        weights += _square(value)
    error, weights, updates = np.sqrt([error, weights, updates])
    change = Requantised(inner, scale, new, error / weights if weights else 0.0, error / updates if updates else 0.0)
    return change, _stored(new, base) if doublings.any() else None


def _in_float32(inner: Change, scale: Scale, whole: Whole) -> Callable[[np.ndarray, int], np.ndarray]:
    """Return what gives the changed rows in float32, from rows of float8 and the number of the first."""
    def read() -> np.ndarray:
        codes = whole()
        rows = codes.reshape(len(codes), -1)
        return (widened(rows) * scale.of_rows(0, *rows.shape)).reshape(codes.shape)

    fill = inner.start(read)

    def changed(rows: np.ndarray, first: int) -> np.ndarray:
        value = widened(rows) * scale.of_rows(first, *rows.shape)
        fill(value, first)
        return value
    return changed


def _stored(scale: Scale, base: Base) -> np.ndarray:
    """Return a scale as its tensor is stored."""
    shape, dtype = base.shape(scale.name), base.dtype(scale.name)
    if dtype in FLOATS:
        return rounded(scale.values, dtype).reshape(shape)
    # E8M0 stores the exponent.
    return (np.frexp(scale.values)[1] + 126).clip(0, 254).astype(np.uint8).view(dtype).reshape(shape)


def _square(value: np.ndarray) -> float:
    return float(np.square(value, dtype=np.float64).sum())
