"""MindPet's checkpoints: the tensors of the deltas by `Parameter.name`, in both of its spellings."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.files import check_name
from mindpet_lite.formats.lora import OWN_ENTRY, A, B, not_dense, refusals
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.strict_json import parse_object

# The entry of our own checkpoints that says what adapts which layer: JSON, by path the `method`, its `settings`, and
# `parameters`, the `Parameter.name` of each tensor. MindPet's have none. What `encode` writes has these `layers` beside
# the names of base parameters that `trained`, of `more` entries of the user's own, and the source's `config`.
SETTINGS_KEY = OWN_ENTRY
_NAME = re.compile(r"(?:(?P<layer>.*?)\.)?(?P<own>mindpet_delta_.*)")
# MindPet names LoRA's factors ..._A and ..._B where a layer stands alone, ..._a and ..._b where it sits in a net.
_LOWER = {"mindpet_delta_lora_A": "mindpet_delta_lora_a", "mindpet_delta_lora_B": "mindpet_delta_lora_b"}


def encode(state: AdapterState) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors as ``<path>.<own name>``, and the entries beside them: `SETTINGS_KEY`, or none.

    What MindPet's checkpoints do not say (rank, alpha and all other settings) stands in the entry; MindPet reads the
    tensors, and needs a net with the same settings. An adapter without settings becomes a file like MindPet's own.

    Raises:
        ValueError: the adapter holds LoRA of a kind that MindPet does not have, or two tensors of one name. All
            problems stand in one message.
    """
    problems: list[str] = []
    of_lora = {path: layer for path, layer in state.layers.items() if (layer.method or state.method) == "lora"}
    if of_lora:
        lora = AdapterState("lora", of_lora)
        problems = refusals(lora, "MindPet's files", (A, B), ("use_rslora",)) + not_dense(lora, "MindPet")
    names = {path: {own: f"{path}.{own}" if path else own for own in layer.tensors}
             for path, layer in state.layers.items()}
    tensors = {names[path][own]: value for path, layer in state.layers.items() for own, value in layer.tensors.items()}
    every = Counter([name for own in names.values() for name in own.values()] + list(state.trained))
    problems += [f"{name} would be the name of {count} tensors." for name, count in every.items() if count > 1]
    if problems:
        raise ValueError("\n  ".join(problems))
    known = any(layer.settings is not None for layer in state.layers.values())
    if not (known or state.trained or state.config):
        return tensors, {}
    entry = {"layers": {path: {"method": layer.method or state.method, "settings": layer.settings,
                               "parameters": names[path]} for path, layer in state.layers.items()},
             "trained": sorted(state.trained), "config": state.config}
    return tensors | state.trained, {SETTINGS_KEY: json.dumps(entry, sort_keys=True)}


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
    by_layer, trained, more, config = _read_settings(settings)
    place_of = {name: (path, own) for path, layer in by_layer.items() for own, name in layer["parameters"].items()}
    problems: list[str] = []
    layers: dict[str, dict[str, np.ndarray]] = {}
    used = {layer["method"] for layer in by_layer.values()}
    problems += [f"{name}, a base parameter that trained, is missing." for name in trained if name not in tensors]
    for name, value in tensors.items():
        if name in trained or name in more:
            continue
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
    if len(used) > 1 and settings is None:
        problems.append(f"it mixes the methods {' and '.join(sorted(used))}.")
    if problems:
        raise ValueError("\n  ".join(problems))
    return AdapterState("+".join(sorted(used)), {
        path: LayerState(parts, by_layer[path]["settings"], by_layer[path]["method"]) if path in by_layer else
        LayerState(parts, None)
        for path, parts in layers.items()}, {name: tensors[name] for name in trained}, config)


def _read_settings(text: str | None) -> tuple[dict[str, Any], list[str], list[str], dict[str, Any]]:
    """Return the layers by path, the base parameters that trained, the user's own entries, and the source's config."""
    if text is None:
        return {}, [], [], {}
    try:
        found = parse_object(text.encode())
        trained, more, config = [], [], {}
        # A layer's entry is never a list, so no layer is taken for this.
        if isinstance(found.get("trained"), list):
            more = found.get("more", [])
            found, trained, config = found["layers"], found["trained"], found["config"]
        if not (isinstance(config, dict) and isinstance(more, list)
                and all(isinstance(name, str) for name in [*trained, *more])):
            raise ValueError("'trained' and 'more' must be lists of names, and 'config' an object")
        for path, layer in found.items():
            # A layer that is the whole net has no path.
            check_name(path or "net")
            if not (isinstance(layer["method"], str) and isinstance(layer["settings"], (dict, type(None)))
                    and all(isinstance(name, str) for name in layer["parameters"].values())):
                raise ValueError("a layer needs 'method', 'settings' and 'parameters'")
        return found, trained, more, config
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"its settings under {SETTINGS_KEY!r} are damaged: {error}.") from error
