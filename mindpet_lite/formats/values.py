"""The values of an adapter as a net takes them."""
from __future__ import annotations

import dataclasses

import numpy as np

from mindpet_lite.arguments import warn_user
from mindpet_lite.formats.files import BF16, as_float, to_bfloat16, type_name
from mindpet_lite.formats.float8 import FLOAT8
from mindpet_lite.formats.state import AdapterState

_WIDE = np.dtype(np.float64)


def in_float32(state: AdapterState, source: str) -> AdapterState:
    """Return the adapter with float32 where the file has bfloat16 or float64, and say so once.

    Args:
        state: the adapter as it stands in a file.
        source: the file's name in the warning.

    Raises:
        ValueError: as `eight_bit_problems`.
    """
    problems = eight_bit_problems(state)
    if problems:
        raise ValueError(f"The adapter in {source} cannot be used:\n  " + "\n  ".join(problems))
    held = {value.dtype for values in (state.trained, state.shared, *(layer.tensors for layer in state.layers.values()))
            for value in values.values()}
    if BF16 in held:
        warn_user(f"{source} stores values as bfloat16: they are read as float32, the same numbers.")
    if _WIDE in held:
        warn_user(f"{source} stores values as float64: they are rounded to float32.")
    if not held & {BF16, _WIDE}:
        return state
    return dataclasses.replace(
        state, trained={name: _in_float32(value) for name, value in state.trained.items()},
        shared={name: _in_float32(value) for name, value in state.shared.items()},
        layers={path: dataclasses.replace(layer, tensors={name: _in_float32(value)
                                                          for name, value in layer.tensors.items()})
                for path, layer in state.layers.items()})


def eight_bit_problems(state: AdapterState) -> list[str]:
    """Return a sentence for each tensor of 8 bit floats: they need a scale to be numbers, and adapters hold none."""
    tensors = {**state.trained, **state.shared, **{f"{path}.{name}": value for path, layer in state.layers.items()
                                   for name, value in layer.tensors.items()}}
    return [f"{name} is of type {type_name(value.dtype)}, an 8 bit float, and the scale that such numbers need is "
            f"missing: save the adapter as F32, F16 or BF16 where it came from."
            for name, value in tensors.items() if value.dtype in FLOAT8]


def _in_float32(value: np.ndarray) -> np.ndarray:
    if value.dtype != _WIDE:
        return as_float(value)
    # What is too large becomes infinite, and is refused as any infinite value.
    with np.errstate(over="ignore"):
        return value.astype(np.float32)


def in_type(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a value in the type that a file had it in, where that changes no number; else as it is."""
    with np.errstate(over="ignore"):
        narrow = to_bfloat16(value) if dtype == BF16 else value.astype(dtype)
    return narrow if np.array_equal(as_float(narrow), value) else value
