"""Files of kohya's trainer (sd-scripts) and of those who follow it: LyCORIS (LoCon, DoRA, LoHa, LoKr), ComfyUI.

Keys are ``lora_unet_<path>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, with underscores for the path's
dots; the scale is alpha / rank, and without an alpha it is 1. DoRA is LyCORIS' ``dora_scale``, one number per output.
"""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats import lycoris
from mindpet_lite.formats.extras import kind_of_part, magnitude, scaled, without_extras
from mindpet_lite.formats.lora import (
    MAGNITUDE,
    OWN_ENTRY,
    A,
    B,
    own_entry,
    pair_problems,
    plain_alpha,
    read_alpha,
    read_own_entry,
    refusals,
    settled,
    without_settings,
)
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.stated_alpha import OF_TENSORS, warn_of_contrary, warn_of_unused
from mindpet_lite.names import components
from mindpet_lite.names.underscores import Paths, cut_together, in_own_names

# By prefix, that which is written first: LyCORIS trains what it is given, of diffusers most of the time.
_COMPONENTS = {"lora_unet": components.UNET, "lycoris": components.UNET, "lora_te": "text_encoder",
               "lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3",
               "lora_transformer": "transformer"}
_NAME = re.compile(rf"({'|'.join(_COMPONENTS)})_(.+)")
_DOWN, _UP, _ALPHA, _DORA, _SCALAR = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "scalar"
_PARTS = (_DOWN, _UP, _ALPHA, _DORA, _SCALAR, *lycoris.PARTS)
# The text encoder of a model with one is `lora_te`, the first of several `lora_te1`; a file with the first alone has
# its prefix in this field of the config.
_TEXT_PREFIX = "text_encoder_prefix"
# Metadata that says what the tensors say, so that it is written anew; and that of kohya's that is kept as it is.
_SUMMARY = ("format", "ss_network_dim", "ss_network_alpha")
_MODULE = "ss_network_module"
_KEPT = ("ss_", "modelspec.")
_CURE = "Load the file with the net it belongs to, or give that base (--base)."
# To look for close names takes long: so many problems get them.
_HINTS = 20


def encode(state: AdapterState) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors by kohya's keys, and the metadata.

    rsLoRA is written as the alpha that gives its scale, see `plain_alpha`; our own entry of the metadata brings it
    back as it was, as it does for paths and dropout.

    Raises:
        ValueError: the adapter holds what such files cannot, or two layers have one name. All problems stand in one
            message.
    """
    problems = refusals(state, "kohya's files", (A, B, MAGNITUDE), ("use_rslora", "use_dora"))
    problems += without_settings(state)
    names = _names(state, problems)
    if problems:
        raise ValueError("\n  ".join(problems))
    tensors: dict[str, np.ndarray] = {}
    for path, layer in state.layers.items():
        own = {_DOWN: layer.tensors[A], _UP: layer.tensors[B], _ALPHA: _as_tensor(plain_alpha(layer.settings or {}))}
        if MAGNITUDE in layer.tensors:
            own[_DORA] = layer.tensors[MAGNITUDE].reshape(-1, *[1] * (layer.tensors[B].ndim - 1))
        tensors.update({f"{names[path]}.{part}": value for part, value in own.items()})
    kept = {key: value for key, value in state.config.items() if key.startswith(_KEPT) and isinstance(value, str)}
    other = {key: value for key, value in state.config.items() if key not in kept}
    return tensors, {_MODULE: _module(state.layers), **kept, **_summary(state.layers),
                     OWN_ENTRY: json.dumps(own_entry(state, names, other), sort_keys=True)}


def decode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str],
           paths: Iterable[str] | None = None) -> AdapterState:
    """Return the adapter of a file of kohya's.

    Args:
        tensors: by the file's keys.
        metadata: of the safetensors file.
        paths: of the net's layers. With them the layers' paths are exact; otherwise, and for layers that the net
            lacks, they are those of the networks that are known, see `underscores`.

    Raises:
        ValueError: keys of no LoRA layer, half a layer, a name that cannot be turned into a path, or an alpha that is
            no positive number. All problems stand in one message.
    """
    parts, problems = _by_layer(without_extras(tensors))
    own, config = read_own_entry(metadata.get(OWN_ENTRY))
    places = _places(parts, {name: layer["path"] for name, layer in own.items()}, paths, problems)
    layers: dict[str, LayerState] = {}
    of_lora = {name: path for name, path in places.items() if not lycoris.is_of_lycoris(parts[name])}
    for name, path in of_lora.items():
        try:
            layers[path] = settled(_layer(path, parts[name]), own[name]["settings"] if name in own else None)
        except ValueError as error:
            problems.append(str(error))
    others = {path: parts[name] for name, path in places.items() if name not in of_lora}
    layers.update(lycoris.read_layers(others, problems))
    problems += [f"{path} stands twice in the file." for path, count in Counter(places.values()).items() if count > 1]
    if not parts and not problems:
        problems.append("it holds no tensor.")
    if problems:
        raise ValueError("\n  ".join(problems))
    of_tensors = lycoris.own_alphas(others, layers, True)
    default = lycoris.own_alphas(others, layers, False)
    for name, path in of_lora.items():
        if _ALPHA in parts[name]:
            of_tensors[path] = (layers[path].settings or {})["lora_alpha"]
        else:
            default[path] = int(parts[name][_DOWN].shape[0])
    warn_of_unused(metadata, default)
    if not default and not own:
        warn_of_contrary(metadata, of_tensors, OF_TENSORS)
    kept = {key: value for key, value in metadata.items() if key not in (*_SUMMARY, OWN_ENTRY)
            and (key, value) != (_MODULE, _module(layers))}
    if any(name.startswith("lora_te1_") for name in parts) and not any(name.startswith("lora_te2_") for name in parts):
        kept[_TEXT_PREFIX] = "lora_te1"
    method, layers = lycoris.of_methods(layers)
    return AdapterState(method, layers, config=kept | config, component=_component(parts, layers))


def _component(names: Iterable[str], paths: Collection[str]) -> str:
    """Return which component a file of one is of, empty where the paths say it."""
    found = {_COMPONENTS[match[1]] for name in names if (match := _NAME.fullmatch(name)) is not None}
    if len(found) > 1 or components.in_paths(paths):
        return ""
    (component,) = found
    return components.denoiser_of(paths) if component == components.UNET else component


def without_prefix(key: str) -> str | None:
    """Return what kohya's key calls the layer, without its component; None for a key of another kind."""
    match = _NAME.fullmatch(key.partition(".")[0])
    return match[2] if match is not None else None


def _names(state: AdapterState, problems: list[str]) -> dict[str, str]:
    """Return kohya's name of each layer by path."""
    places = components.split(state.layers, state.component)
    several = any(component == "text_encoder_2" for component, _ in places.values())
    first = "lora_te1" if several or state.config.get(_TEXT_PREFIX) == "lora_te1" else "lora_te"
    prefixes = {component: prefix for prefix, component in reversed(_COMPONENTS.items())} | {"text_encoder": first}
    names: dict[str, str] = {}
    path_of: dict[str, str] = {}
    for path, (component, below) in places.items():
        if component not in prefixes or not below:
            problems.append(f"{path!r}: kohya's files have no name for {component if below else 'the net itself'}.")
            continue
        prefix = "lora_unet" if component == "transformer" and in_own_names(below) else prefixes[component]
        names[path] = f"{prefix}_{below.replace('.', '_')}"
        if names[path] in path_of:
            problems.append(f"{path} and {path_of[names[path]]} would have one name, {names[path]}: kohya's files do "
                            f"not tell dots from underscores.")
        path_of[names[path]] = path
    return names


def _by_layer(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return the tensors by layer name and part, and the problems of keys."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    problems: list[str] = []
    for key, value in tensors.items():
        name, _, part = key.partition(".")
        if not _NAME.fullmatch(name):
            problems.append(f"{key} is no key of kohya's: they start with {', '.join(_COMPONENTS)}.")
        elif part not in _PARTS:
            problems.append(f"{key} is {kind_of_part(part)}, which cannot be read here: known are {', '.join(_PARTS)}.")
        else:
            parts.setdefault(name, {})[part] = value
    return parts, problems


def _places(names: Iterable[str], own: Mapping[str, str], paths: Iterable[str] | None,
            problems: list[str]) -> dict[str, str]:
    """Return the path of each layer by kohya's name: as we wrote it, as the net has it, or as known networks do."""
    net = Paths(paths)
    split = {name: _NAME.fullmatch(name).groups() for name in names}  # type: ignore[union-attr]
    cuts = {prefix: cut_together(below for own_prefix, below in split.values() if own_prefix == prefix)
            for prefix in {prefix for prefix, _ in split.values()}}
    # kohya's trainers call a transformer of diffusion the U-Net, too.
    kinds = {prefix: components.TRANSFORMER if _COMPONENTS[prefix] == components.UNET and components.component_of(
        path for paths in those.values() for path in paths) == components.TRANSFORMER else _COMPONENTS[prefix]
        for prefix, those in cuts.items()}
    present = set(kinds.values())
    found: dict[str, str] = {}
    for name, (prefix, below) in split.items():
        component = kinds[prefix]
        try:
            path = net.known(below, f"{component}_{below}")
        except ValueError as error:
            problems.append(str(error))
            continue
        cut = [path.removeprefix(f"{component}.")] if path else cuts[prefix][below]
        if name in own or len(cut) == 1:
            found[name] = own.get(name) or components.join(component, cut[0], present)
        elif cut:
            problems.append(f"{name} may be {' or '.join(cut)}: the underscores do not say. {_CURE}")
        else:
            problems.append(f"{name}: the underscores do not say which are dots, and it is no layer of a network that "
                            f"is known here. {_CURE}{net.near(below) if len(problems) < _HINTS else ''}")
    return found


def _layer(path: str, parts: Mapping[str, np.ndarray]) -> LayerState:
    missing = [part for part in (_DOWN, _UP) if part not in parts]
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}.")
    tensors = {A: parts[_DOWN], B: parts[_UP]}
    problems = pair_problems(path, tensors)
    if problems:
        raise ValueError(problems[0])
    rank = int(parts[_DOWN].shape[0])
    settings: dict[str, Any] = {
        "lora_rank": rank, "lora_alpha": read_alpha(path, parts[_ALPHA], rank) if _ALPHA in parts else rank,
        "lora_dropout": 0.0}
    if _SCALAR in parts:
        settings["lora_alpha"] = scaled(path, settings["lora_alpha"], parts[_SCALAR])
    if _DORA in parts:
        tensors[MAGNITUDE] = magnitude(path, parts[_DORA], parts[_UP])
        settings["use_dora"] = True
    return LayerState(tensors, settings)


def _as_tensor(alpha: float) -> np.ndarray:
    """Return alpha as kohya writes it, in float32, or in float64 where float32 would round it."""
    with np.errstate(over="ignore"):
        single = np.asarray(alpha, np.float32)
    return single if float(single) == alpha else np.asarray(alpha, np.float64)


def _module(layers: Mapping[str, LayerState]) -> str:
    """Return the trainer's module that makes such layers."""
    return "lycoris.kohya" if any(MAGNITUDE in layer.tensors for layer in layers.values()) else "networks.lora"


def _summary(layers: Mapping[str, LayerState]) -> dict[str, str]:
    """Return the metadata that repeats rank and alpha; kohya's tools write "Dynamic" where layers differ."""
    ranks = Counter((layer.settings or {})["lora_rank"] for layer in layers.values())
    alphas = Counter(float(plain_alpha(layer.settings or {})) for layer in layers.values())
    return {"format": "pt", "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic"}
