"""Adapter directories of methods, or of several at once, that no other tool's file can hold: our own names."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.state import AdapterState, LayerState

# No `peft_type`: PEFT refuses such a directory instead of guessing.
FORMAT = "mindpet_lite"


def encode(state: AdapterState) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors as ``<layer path>.<name below the layer>``, and a config with method and settings."""
    tensors = {f"{path}.{name}": value for path, layer in state.layers.items()
               for name, value in layer.tensors.items()}
    tensors.update({**state.trained, **state.shared})
    layers = {path: {"settings": layer.settings, "tensors": sorted(layer.tensors),
                     **({"method": layer.method} if "+" in state.method else {})}
              for path, layer in state.layers.items()}
    return tensors, {**state.config, "format": FORMAT, "pet_type": state.method, "layers": layers,
                     "trained": sorted(state.trained), **({"shared": sorted(state.shared)} if state.shared else {})}


def decode(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> AdapterState:
    """Return the adapter that `encode` wrote.

    Raises:
        ValueError: the config is damaged, or tensors and config disagree. All problems stand in one message.
    """
    layers = config.get("layers")
    if not isinstance(config.get("pet_type"), str) or not config["pet_type"] or not isinstance(layers, dict):
        raise ValueError("the config must hold 'pet_type' (a method's name) and 'layers' (settings by path).")
    damaged = [path for path, layer in layers.items()
               if not isinstance(layer, dict) or not isinstance(layer.get("settings"), dict)
               or not isinstance(layer.get("tensors"), list)
               or not all(isinstance(name, str) for name in layer["tensors"])
               or layer.get("method", None if "+" in config["pet_type"] else config["pet_type"])
               not in config["pet_type"].split("+")]
    if damaged:
        raise ValueError(f"the config needs 'settings' and 'tensors', and with several methods 'method', for "
                         f"{', '.join(map(repr, damaged))}.")
    trained, shared = config.get("trained", []), config.get("shared", [])
    for field, names in (("trained", trained), ("shared", shared)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"the config's {field!r} must be a list of parameter paths.")
    expected = {f"{path}.{name}": (path, name) for path, layer in layers.items() for name in layer["tensors"]}
    problems = [f"missing: {key}." for key in [*expected, *trained, *shared] if key not in tensors]
    problems += [f"unexpected: {key}." for key in tensors if key not in expected and key not in [*trained, *shared]]
    if problems or not expected:
        raise ValueError("\n  ".join(problems) or "it holds no tensor.")
    found = {path: LayerState({}, layer["settings"], layer.get("method", "")) for path, layer in layers.items()}
    for key, (path, name) in expected.items():
        found[path].tensors[name] = tensors[key]
    ours = ("format", "pet_type", "layers", "trained", "shared")
    kept = {name: value for name, value in config.items() if name not in ours}
    return AdapterState(config["pet_type"], found, {name: tensors[name] for name in trained}, kept,
                        shared={name: tensors[name] for name in shared})
