"""What an adapter is, free of any framework and any file format."""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerState:
    """The delta of one layer: its tensors by their path below the layer, its settings by config field name.

    `settings` is None where the file does not tell them.
    """

    tensors: dict[str, np.ndarray]
    settings: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter: the method's name (`pet_type`) and the state of each adapted layer by its path in the net."""

    method: str
    layers: dict[str, LayerState]
