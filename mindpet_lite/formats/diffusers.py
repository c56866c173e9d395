"""The LoRA files of Hugging Face diffusers (``pytorch_lora_weights.safetensors``): one file, a config as metadata.

Files of LyCORIS with dotted paths are read here, too.
"""
from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats import lycoris, peft
from mindpet_lite.formats.dotted_keys import by_component, component_of_keys, unknown_keys
from mindpet_lite.formats.extras import NOTHING, kind_of_part, magnitude, scaled, without_extras
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
from mindpet_lite.formats.stated_alpha import OF_TENSORS, stated_alpha, warn_of_contrary, warn_of_unused
from mindpet_lite.formats.strict_json import parse_object
from mindpet_lite.names import components
from mindpet_lite.names.underscores import in_own_names

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
    r"(?P<path>.+)\.lora_(?P<factor>down|up)\.(?P<kind>weight)",
    r"(?P<path>.+)\.(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<factor>down|up)\.(?P<kind>weight)",
    r"(?P<path>.+)\.(?P<number>alpha|dora_scale|scalar)")]
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
    places = components.split(state.layers, state.component)
    names = sorted({component for component, _ in places.values()})
    problems = [f"{path} has its name in the network's own code, and diffusers has another name for it or several "
                f"layers in its place: give the layers diffusers' names with a table (--names)."
                for path, (component, below) in places.items()
                if component in ("transformer", "transformer_2") and in_own_names(below)]
    if problems:
        raise ValueError("\n  ".join(problems))
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for component in names:
        layers = {below: state.layers[path] for path, (owner, below) in places.items() if owner == component}
        part, fields = peft.encode(AdapterState(state.method, layers,
                                                config=_fields_of(state.config, component, names)))
        fields = _by_ends(fields) if component.startswith("text_encoder") else fields
        problems += _changes(component, layers, peft.decode(part, fields))
        tensors.update({f"{component}.{key.removeprefix(_PEFT)}": value for key, value in part.items()})
        # diffusers hands the fields to PEFT's LoraConfig, which takes no other.
        config.update({f"{component}.{field}": value for field, value in fields.items() if field in PEFT_FIELDS})
    if problems:
        raise ValueError("\n  ".join(problems))
    own = {"component_in_paths": not state.component and components.in_paths(state.layers), "config": state.config}
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
    """Return the adapter of a file in any of diffusers' layouts, or with kohya's names of tensors behind dotted paths.

    The alpha of a file without config is that of its tensors, else the one that its metadata state (`stated_alpha`),
    else the rank, as diffusers reads it.

    Args:
        tensors: by the file's keys: new (``unet.<path>.lora_A.weight``, with or without component and adapter name),
            ``<path>.lora.down.weight``, that of attention processors (``<path>.processor.to_q_lora.down.weight``), or
            ``<path>.lora_down.weight`` with or without ``<path>.alpha``, ``.dora_scale`` and ``.scalar`` (OneTrainer,
            LyCORIS). ``diffusion_model.`` (ComfyUI) may stand for the component.
        metadata: of the safetensors file.

    Raises:
        ValueError: keys of no LoRA layer, of several adapters, or twice; a damaged config; a part that LoRA has no
            place for; or what `peft.decode` refuses. All problems of a kind stand in one message.
    """
    tensors = without_extras(tensors)
    if any(lycoris.is_of_lycoris([key.rpartition(".")[2]]) for key in tensors):
        return _lycoris(tensors, metadata)
    parts, numbers = _sorted_out(tensors)
    own, config = _own(metadata), _config(metadata)
    layers, kept, problems = {}, {}, []
    for component, part in parts.items():
        by_kind = numbers[component]
        if config is not None and (by_kind["alpha"] or by_kind["scalar"]):
            raise ValueError(f"the file has a config ({CONFIG_ENTRY}) and keys of alpha: which counts is not said.")
        try:
            part |= _magnitudes(part, by_kind["dora_scale"])
            fields = _inferred(part, by_kind, metadata, component) if config is None else \
                _fields_of(config, component, list(parts))
            state = peft.decode(part, fields)
        except ValueError as error:
            problems.append(f"{component}: {error}")
            continue
        layers.update({components.join(component, path, parts, own["component_in_paths"]): layer
                       for path, layer in state.layers.items()})
        kept.update({components.join(component, field, parts): value for field, value in fields.items()})
    if problems:
        raise ValueError("\n  ".join(problems))
    component = "" if len(parts) > 1 or own["component_in_paths"] else \
        component_of_keys(tensors, layers, next(iter(parts)))
    return AdapterState("lora", layers, config=own.get("config", {} if config is None else kept), component=component)


def _lycoris(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> AdapterState:
    """Return the adapter of LoHa or LoKr with LyCORIS' names of parts behind dotted paths."""
    problems = unknown_keys(tensors)
    if CONFIG_ENTRY in metadata:
        problems.append(f"the file has a config of LoRA ({CONFIG_ENTRY}) beside tensors of LoHa or LoKr.")
    places = by_component(tensors)
    present = {component for component, _ in places.values()}
    parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, (component, below) in places.items():
        path, _, part = below.rpartition(".")
        if not path or part not in (*lycoris.PARTS, *lycoris.BESIDE):
            what = kind_of_part(part)
            problems.append(f"{key}{'' if what == NOTHING else f' is {what}, which'} cannot be read beside LoHa or "
                            f"LoKr.")
            continue
        own = parts[components.join(component, path, present)]
        if part in own:
            problems.append(f"{key} stands twice in the file, under two names of its component.")
        own[part] = tensors[key]
    problems += [f"{path}.{', '.join(own)} belongs to no layer of the file." for path, own in parts.items()
                 if not lycoris.is_of_lycoris(own)]
    layers = lycoris.read_layers({path: own for path, own in parts.items() if lycoris.is_of_lycoris(own)}, problems)
    if problems:
        raise ValueError("\n  ".join(problems))
    warn_of_unused(metadata, lycoris.own_alphas(parts, layers, False))
    method, layers = lycoris.of_methods(layers)
    component = "" if len(present) > 1 else component_of_keys(tensors, layers, next(iter(present)))
    return AdapterState(method, layers, component=component)


# The tensors of a component by PEFT's keys, and beside them by kind (`alpha`, `dora_scale`, `scalar`) those by path.
_Parts = dict[str, np.ndarray]
_Numbers = dict[str, dict[str, np.ndarray]]


def _sorted_out(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, _Parts], dict[str, _Numbers]]:
    """Return by component the tensors by PEFT's keys, and those beside them."""
    parts: dict[str, _Parts] = defaultdict(dict)
    numbers: dict[str, _Numbers] = defaultdict(lambda: defaultdict(dict))
    problems = unknown_keys(tensors)
    adapters: set[str | None] = set()
    for key, (component, below) in by_component(tensors).items():
        match = next(filter(None, (layout.fullmatch(below.replace(".processor.", ".")) for layout in _LAYOUTS)), None)
        if match is None:
            problems.append(f"{key} is {_what(key)}, which cannot be read here.")
            continue
        found = match.groupdict()
        adapters |= {found["adapter"]} if "adapter" in found else set()
        path = found["path"] + (f".{_old_name(found['old'], component)}" if found.get("old") else "")
        if found.get("number"):
            place, name = numbers[component][found["number"]], path
        else:
            tail = f".{found['kind']}" if found.get("kind") else ""
            place, name = parts[component], f"{_PEFT}{path}.{_FACTORS.get(found['factor'], found['factor'])}{tail}"
        if name in place:
            problems.append(f"{key} stands twice in the file, in two layouts.")
        place[name] = tensors[key]
    if len(adapters) > 1:
        problems.append(f"it holds several adapters: {', '.join(sorted(map(str, adapters)))}.")
    problems += [f"{path}.{kind} belongs to no layer of the file." for component in numbers.keys() - parts.keys()
                 for kind, found in numbers[component].items() for path in found]
    if not parts and not problems:
        problems.append("it holds no tensor.")
    if problems:
        raise ValueError("\n  ".join(problems))
    return parts, numbers


def _what(key: str) -> str:
    """Return what a key is by the part behind the layer's path."""
    parts = key.split(".")
    return next((what for start in range(len(parts)) if (what := kind_of_part(".".join(parts[start:]))) != NOTHING),
                f"{NOTHING} in any of diffusers' layouts")


def _magnitudes(part: _Parts, scales: Mapping[str, np.ndarray]) -> _Parts:
    """Return DoRA's magnitudes by PEFT's keys."""
    without = [path for path in scales if f"{_PEFT}{path}.lora_B.weight" not in part]
    if without:
        raise ValueError(f"dora_scale without a layer: {', '.join(without)}.")
    return {f"{_PEFT}{path}.lora_magnitude_vector": magnitude(path, value, part[f"{_PEFT}{path}.lora_B.weight"])
            for path, value in scales.items()}


def _old_name(name: str, component: str) -> str:
    return _OLD_TEXT[name] if component.startswith("text_encoder") else _OLD_UNET.get(name, name)


def _inferred(part: _Parts, numbers: _Numbers, metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """Return the config of a file without one: ranks by the shapes, alpha as given or the rank."""
    ranks = {key.removeprefix(_PEFT).removesuffix(".lora_A.weight"): int(value.shape[0]) for key, value in part.items()
             if key.endswith(".lora_A.weight") and value.ndim}
    if not ranks:
        raise ValueError("it has no config and no factor A to tell the rank by.")
    alphas, scalars = numbers["alpha"], numbers["scalar"]
    for kind, found in (("alpha", alphas), ("scalar", scalars)):
        unknown = [path for path in found if path not in ranks]
        if unknown:
            raise ValueError(f"{kind} without a layer: {', '.join(unknown)}.")
    stated = None if alphas else stated_alpha(metadata, component, ranks.values())
    default = {path: rank if stated is None else stated for path, rank in ranks.items() if path not in alphas}
    warn_of_unused(metadata, default)
    if not default:
        warn_of_contrary(metadata, {path: read_alpha(path, value, ranks[path]) for path, value in alphas.items()},
                         OF_TENSORS)
    settings = {path: (rank, read_alpha(path, alphas[path], rank) if path in alphas else default[path])
                for path, rank in ranks.items()}
    settings |= {path: (ranks[path], scaled(path, settings[path][1], value)) for path, value in scalars.items()}
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
        raise ValueError(f"its entry {OWN_ENTRY!r:.100} {error}") from error
    if isinstance(found.get("component_in_paths"), bool) and isinstance(found.get("config"), dict):
        return found
    raise ValueError(f"its entry {OWN_ENTRY!r:.100} is damaged: it needs 'component_in_paths' and 'config'.")


def _fields_of(config: Mapping[str, Any], component: str, names: Collection[str]) -> dict[str, Any]:
    """Return the fields of one component; a file of the U-Net alone may have them without its name."""
    found = {field.removeprefix(f"{component}."): value for field, value in config.items()
             if field.startswith(f"{component}.")}
    return found or (dict(config) if len(names) == 1 else {})
