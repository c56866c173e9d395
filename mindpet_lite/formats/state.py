"""What an adapter is, free of any framework and any file format."""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerState:
    """The delta of one layer.

    Args:
        tensors: by their path below the layer.
        settings: by config field name; None where the file does not tell them.
        method: the method's name, where the adapter is of several; else that of the adapter.
    """

    tensors: dict[str, np.ndarray]
    settings: dict[str, Any] | None
    method: str = ""


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter as every format is read to and written from.

    Args:
        method: the method's name (`pet_type`); of several methods their names with ``+`` between them.
        layers: the state of each adapted layer by its path in the net.
        trained: base parameters that trained beside the deltas, by their path in the net.
        config: fields of the source's config that are no setting of a layer, kept for writing the same format again.
        carried: tensors that change nothing, by the source's own keys, kept likewise.
        component: of a diffusion pipeline, which the whole adapter is of (`names.components`). Empty where the file
            does not say, or is of several: these stand in the paths.
        shared: tensors that layers share, by our name.
    """

    method: str
    layers: dict[str, LayerState]
    trained: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    carried: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    component: str = ""
    shared: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
