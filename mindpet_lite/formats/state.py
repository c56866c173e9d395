"""What an adapter is, free of any framework and any file format."""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerState:
    """The delta of one layer: its tensors by the cell's attribute names, and its settings by config field name."""

    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter: the method's name (`pet_type`) and the state of each adapted layer by its path in the net."""

    method: str
    layers: dict[str, LayerState]
