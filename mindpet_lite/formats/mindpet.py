"""MindPet's checkpoints: the tensors of the deltas by `Parameter.name`, in both of its spellings."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.state import AdapterState, LayerState

# The entry of our own checkpoints that says what adapts which layer: JSON, by path the `method`, its `settings`, and
# `parameters`, the `Parameter.name` of each tensor. MindPet's have none.
SETTINGS_KEY = "mindpet_lite"
_NAME = re.compile(r"(?:(?P<layer>.*?)\.)?(?P<own>mindpet_delta_.*)")
# MindPet names LoRA's factors ..._A and ..._B where a layer stands alone, ..._a and ..._b where it sits in a net.
_LOWER = {"mindpet_delta_lora_A": "mindpet_delta_lora_a", "mindpet_delta_lora_B": "mindpet_delta_lora_b"}


def decode(tensors: Mapping[str, np.ndarray], settings: str | None, methods: Iterable[str]) -> AdapterState:
    """Return the adapter in a checkpoint.

    Args:
        tensors: by `Parameter.name`.
        methods: the names of the methods there are.
        settings: the JSON text under `SETTINGS_KEY`, or None for a checkpoint of MindPet's own. Without it the
            layers go by what stands before a delta's name, and their settings are None.

    Raises:
        ValueError: a tensor belongs to no adapted layer, two differ in spelling only, or the settings are damaged.
            All problems stand in one message.
    """
    by_layer = _read_settings(settings)
    place_of = {name: (path, own) for path, layer in by_layer.items() for own, name in layer["parameters"].items()}
    problems: list[str] = []
    layers: dict[str, dict[str, np.ndarray]] = {}
    used = {layer["method"] for layer in by_layer.values()}
    for name, value in tensors.items():
        match = _NAME.fullmatch(name)
        method = next((item for item in sorted(methods, key=len, reverse=True) if match is not None
                       and match["own"].startswith(f"mindpet_delta_{item}")), None)
        if name in place_of:
            path, own = place_of[name]
        elif match is not None and method is not None and settings is None:
            path, own = match["layer"] or "", _LOWER.get(match["own"], match["own"])
            used.add(method)
        else:
            problems.append(f"{name} belongs to no adapted layer: adapt the net as it was trained, and load the file "
                            f"with mindspore.load_param_into_net.")
            continue
        if own in layers.setdefault(path, {}):
            problems.append(f"{name} stands twice in the file, in both spellings.")
        layers[path][own] = value
    if not layers and not problems:
        problems.append("it holds no tensor.")
    if len(used) > 1:
        problems.append(f"it mixes the methods {' and '.join(sorted(used))}.")
    if problems:
        raise ValueError("\n  ".join(problems))
    return AdapterState(used.pop(), {
        path: LayerState(parts, by_layer[path]["settings"] if path in by_layer else None)
        for path, parts in layers.items()})


def _read_settings(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
        for layer in found.values():
            if not (isinstance(layer["method"], str) and isinstance(layer["settings"], dict)
                    and isinstance(layer["parameters"], dict)):
                raise ValueError("a layer needs 'method', 'settings' and 'parameters'")
        return found
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"its settings under {SETTINGS_KEY!r} are damaged: {error}.") from error
