"""What an adapter of a method other than LoRA makes of a base's tensors: by the method's own arithmetic."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from mindpet_lite.formats.files import as_float
from mindpet_lite.formats.state import LayerState
from mindpet_lite.offline.base import Base
from mindpet_lite.offline.changes import Change, Fill, Whole
from mindpet_lite.offline.numbers import Scratch, store, widened

Numbers = Mapping[str, np.ndarray]


class Mergeable(Protocol):
    """A method's class of layers, as far as merging knows it."""

    unmergeable: str

    @staticmethod
    def merged(base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the new weight and, where it changes, the new bias."""


@dataclasses.dataclass(frozen=True)
class Remade:
    """A tensor that is made anew from the whole of it, in float32 (float64 where the base is), and rounded once.

    Args:
        make: gives the new tensor for the old one.
    """

    make: Callable[[np.ndarray], np.ndarray]

    def start(self, whole: Whole) -> Fill:
        """Return what puts the new values in; see `Change`."""
        old = whole()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            new = np.ascontiguousarray(self.make(widened(old)))
        if new.shape != old.shape:
            raise ValueError(f"the adapter makes a tensor of shape {new.shape} of one of shape {old.shape}.")
        new, scratch = new.reshape(len(new), -1), Scratch()
        return lambda rows, first: store(new[first:first + len(rows)].copy(), rows, scratch)


def remade(layer: LayerState, shared: Numbers, weight: str, in_by_out: bool | None, method: Mergeable,
           base: Base) -> dict[str, Change]:
    """Return what the delta of one layer changes.

    Args:
        layer: the delta.
        shared: the tensors that layers share.
        weight: the base's name of the layer's weight.
        in_by_out: whether the base holds the weight as (inputs, outputs); None where that is not known.
        method: whose delta it is.
        base: the base.

    Raises:
        ValueError: it cannot be merged.
    """
    if method.unmergeable:
        raise ValueError(method.unmergeable)
    if layer.settings is None:
        raise ValueError("its settings are not known, for the file does not say them; load it into a net that was "
                         "adapted as in training, and merge that.")
    shape = base.shape(weight)
    if in_by_out is None and len(shape) == 2:
        raise ValueError(f"its weight of shape {shape} may lie as (out, in) or, as GPT-2's Conv1D, as (in, out): put "
                         f"the base's own config.json beside it.")
    turned = bool(in_by_out) and len(shape) == 2
    tensors = {name: as_float(value).astype(np.float32) for name, value in {**layer.tensors, **shared}.items()}
    bias = base.parameter(weight.rpartition(".")[0] + ".bias")

    def new(values: Numbers) -> dict[str, np.ndarray]:
        return method.merged(values, tensors, layer.settings or {})

    def of_weight(value: np.ndarray) -> np.ndarray:
        found = new({"weight": value.T if turned else value})["weight"]
        return found.T if turned else found

    def of_bias(value: np.ndarray) -> np.ndarray:
        whole = widened(base.read(weight))
        return new({"weight": whole.T if turned else whole, "bias": value})["bias"]

    # Numbers of the right shapes tell what changes.
    example = new({"weight": np.zeros(shape[::-1] if turned else shape, np.float32),
                   **({} if bias is None else {"bias": np.zeros(base.shape(bias), np.float32)})})
    found: dict[str, Change] = {weight: Remade(of_weight)} if "weight" in example else {}
    if bias is not None and "bias" in example:
        found[bias] = Remade(of_bias)
    return found
