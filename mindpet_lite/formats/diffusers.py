"""The LoRA files of Hugging Face diffusers (``pytorch_lora_weights.safetensors``): one file, a config as metadata."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats import peft
from mindpet_lite.formats.lora import (
    B_BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    OWN_ENTRY,
    PEFT_FIELDS,
    A,
    B,
    read_alpha,
    refusals,
    without_settings,
)
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.strict_json import parse_object
from mindpet_lite.names import components

# The metadata that holds the config: PEFT's fields, each behind its component's name.
CONFIG_ENTRY = "lora_adapter_metadata"
_PEFT = "base_model.model."
_TENSORS = (A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, B_BIAS)
_SETTINGS = ("use_rslora", "use_dora", "lora_bias", "init_lora_weights")
# What may stand behind a layer's path, newest layout first; the groups name the layer below `path`, its factor, the
# adapter.
_LAYOUTS = [re.compile(pattern) for pattern in (
    r"(?P<path>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)",
    r"(?P<path>.+)\.(?P<factor>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?",
    r"(?P<path>.+)\.(?P<factor>lora_magnitude_vector)(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?",
    r"(?P<path>.+)\.lora(?:_linear_layer)?\.(?P<factor>down|up)\.(?P<kind>weight)",
    r"(?P<path>.+)\.(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<factor>down|up)\.(?P<kind>weight)",
    r"(?P<path>.+)\.(?P<factor>alpha)")]
_FACTORS = {"A": "lora_A", "B": "lora_B", "down": "lora_A", "up": "lora_B"}
# The attention processors of old files name the layers of text encoders as those of the U-Net.
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def encode(state: AdapterState) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the newest layout's tensors by key, and the metadata with the whole config.

    Raises:
        ValueError: the adapter holds what diffusers' files cannot.
    """
    problems = refusals(state, "diffusers' LoRA files", _TENSORS, _SETTINGS) + without_settings(state)
    if problems:
        raise ValueError("\n  ".join(problems))
    places = components.split(state.layers)
    names = sorted({component for component, _ in places.values()})
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for component in names:
        layers = {below: state.layers[path] for path, (home, below) in places.items() if home == component}
        part, fields = peft.encode(AdapterState(state.method, layers,
                                                config=_fields_of(state.config, component, names)))
        fields = _by_ends(fields) if component.startswith("text_encoder") else fields
        problems += _changes(component, layers, peft.decode(part, fields))
        tensors.update({f"{component}.{key.removeprefix(_PEFT)}": value for key, value in part.items()})
        # diffusers hands the fields to PEFT's LoraConfig, which takes no other.
        config.update({f"{component}.{field}": value for field, value in fields.items() if field in PEFT_FIELDS})
    if problems:
        raise ValueError("\n  ".join(problems))
    own = {"component_in_paths": components.in_paths(state.layers), "config": state.config}
    return tensors, {"format": "pt", CONFIG_ENTRY: json.dumps(config, indent=2, sort_keys=True),
                     OWN_ENTRY: json.dumps(own, sort_keys=True)}


def _by_ends(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a text encoder's config without what stands before CLIP's layers in older versions of transformers.

    PEFT compares the names in it with the ends of paths, so that they fit older and newer versions.
    """
    found = dict(fields)
    if isinstance(fields.get("target_modules"), list):
        found["target_modules"] = [name.removeprefix("text_model.") for name in fields["target_modules"]]
    for name in ("rank_pattern", "alpha_pattern"):
        found[name] = {key.removeprefix("text_model."): value for key, value in (fields.get(name) or {}).items()}
    return found


def _changes(component: str, layers: Mapping[str, LayerState], read: AdapterState) -> list[str]:
    """Return which settings PEFT's config, one for all layers of a component, does not give back as they were."""
    return [f"{component}.{path}: {name}={value!r} cannot stand in PEFT's config beside those of the other layers."
            for path, layer in layers.items() for name, value in (layer.settings or {}).items()
            if (read.layers[path].settings or {}).get(name) != value]


def decode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> AdapterState:
    """Return the adapter of a file in any of diffusers' layouts.

    A file without config has alpha = rank, as diffusers reads it, unless it holds an alpha for each layer.

    Args:
        tensors: by the file's keys: new (``unet.<path>.lora_A.weight``, with or without component and adapter name),
            ``<path>.lora.down.weight``, or that of attention processors (``<path>.processor.to_q_lora.down.weight``).
        metadata: of the safetensors file.

    Raises:
        ValueError: keys of no LoRA layer, of several adapters, or twice; a damaged config; or what `peft.decode`
            refuses. All problems of a kind stand in one message.
    """
    parts, alphas = _sorted_out(tensors)
    own, config = _own(metadata), _config(metadata)
    layers, kept, problems = {}, {}, []
    for component, part in parts.items():
        if config is None:
            fields = _inferred(part, alphas.get(component, {}))
        elif alphas:
            raise ValueError(f"the file has a config ({CONFIG_ENTRY}) and keys of alpha: which counts is not said.")
        else:
            fields = _fields_of(config, component, list(parts))
        try:
            state = peft.decode(part, fields)
        except ValueError as error:
            problems.append(f"{component}: {error}")
            continue
        layers.update({components.join(component, path, parts, own["component_in_paths"]): layer
                       for path, layer in state.layers.items()})
        kept.update({components.join(component, field, parts): value for field, value in fields.items()})
    if problems:
        raise ValueError("\n  ".join(problems))
    return AdapterState("lora", layers, config=own.get("config", {} if config is None else kept))


def _sorted_out(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]],
                                                            dict[str, dict[str, np.ndarray]]]:
    """Return by component the tensors by PEFT's keys, and the alphas by path."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    alphas: dict[str, dict[str, np.ndarray]] = {}
    problems, adapters = [], set()
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        component, below = (head, rest) if head in components.COMPONENTS else (components.UNET, key)
        match = next(filter(None, (layout.fullmatch(below.replace(".processor.", ".")) for layout in _LAYOUTS)), None)
        if match is None:
            problems.append(f"{key} is no tensor of a LoRA layer in any of diffusers' layouts.")
            continue
        found = match.groupdict()
        adapters |= {found["adapter"]} if "adapter" in found else set()
        path = found["path"] + (f".{_old_name(found['old'], component)}" if found.get("old") else "")
        if found["factor"] == "alpha":
            place, name = alphas, path
        else:
            tail = f".{found['kind']}" if found.get("kind") else ""
            place, name = parts, f"{_PEFT}{path}.{_FACTORS.get(found['factor'], found['factor'])}{tail}"
        if name in place.setdefault(component, {}):
            problems.append(f"{key} stands twice in the file, in two layouts.")
        place[component][name] = value
    if len(adapters) > 1:
        problems.append(f"it holds several adapters: {', '.join(sorted(map(str, adapters)))}.")
    if not parts and not problems:
        problems.append("it holds no tensor.")
    if problems:
        raise ValueError("\n  ".join(problems))
    return parts, alphas


def _old_name(name: str, component: str) -> str:
    return _OLD_TEXT[name] if component.startswith("text_encoder") else _OLD_UNET.get(name, name)


def _inferred(part: Mapping[str, np.ndarray], alphas: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the config of a file without one: ranks by the shapes, alpha as given or the rank."""
    ranks = {key.removeprefix(_PEFT).removesuffix(".lora_A.weight"): int(value.shape[0]) for key, value in part.items()
             if key.endswith(".lora_A.weight") and value.ndim}
    if not ranks:
        raise ValueError("it has no config and no factor A to tell the rank by.")
    unknown = [path for path in alphas if path not in ranks]
    if unknown:
        raise ValueError(f"alpha without a layer: {', '.join(unknown)}.")
    settings = {path: (rank, read_alpha(path, alphas[path], rank) if path in alphas else rank)
                for path, rank in ranks.items()}
    rank, alpha = Counter(settings.values()).most_common(1)[0][0]
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
            "rank_pattern": {f"^{re.escape(path)}$": own for path, (own, _) in settings.items() if own != rank},
            "alpha_pattern": {f"^{re.escape(path)}$": own for path, (_, own) in settings.items() if own != alpha},
            "use_dora": any(key.endswith(".lora_magnitude_vector") for key in part),
            "lora_bias": any(key.endswith(".lora_B.bias") for key in part)}


def _config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if CONFIG_ENTRY not in metadata:
        return None
    try:
        return parse_object(metadata[CONFIG_ENTRY].encode())
    except ValueError as error:
        raise ValueError(f"its config ({CONFIG_ENTRY}) {error}") from error


def _own(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return our own entry: whether the component stands in the paths, and the config the adapter had."""
    if OWN_ENTRY not in metadata:
        return {"component_in_paths": False}
    try:
        found = parse_object(metadata[OWN_ENTRY].encode())
    except ValueError as error:
        raise ValueError(f"its entry {OWN_ENTRY!r} {error}") from error
    if isinstance(found.get("component_in_paths"), bool) and isinstance(found.get("config"), dict):
        return found
    raise ValueError(f"its entry {OWN_ENTRY!r} is damaged: it needs 'component_in_paths' and 'config'.")


def _fields_of(config: Mapping[str, Any], component: str, names: Collection[str]) -> dict[str, Any]:
    """Return the fields of one component; a file of the U-Net alone may have them without its name."""
    found = {field.removeprefix(f"{component}."): value for field, value in config.items()
             if field.startswith(f"{component}.")}
    return found or (dict(config) if len(names) == 1 else {})
