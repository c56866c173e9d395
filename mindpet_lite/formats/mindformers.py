"""MindFormers' LoRA adapters: tensors by `Parameter.name`, and beside them ``adapter_config.json``.

The config is what its serving of several adapters reads: one `r`, `lora_alpha` and `lora_dropout` for all layers, the
scale is lora_alpha / r, and `target_modules` holds the layers' last names. Files of its training have no config; they
are MindPet's, but for the names ``.lora_a`` and ``.lora_b`` in newer versions. torchtune's ``.lora_a.weight`` is read
likewise: A and B of the same shapes, and no alpha in the file.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mindpet_lite.arguments import MAX_ALPHA, is_alpha
from mindpet_lite.formats.lora import (
    OWN_ENTRY,
    PEFT_FIELDS,
    A,
    B,
    not_dense,
    own_entry,
    pair_problems,
    plain_alpha,
    read_own_entry,
    refusals,
    settled,
    without_settings,
)
from mindpet_lite.formats.state import AdapterState, LayerState

_KEY = re.compile(r"(?P<path>.+)\.(?:mindpet_delta_)?lora_(?P<factor>[abAB])(?:\.weight)?")
_OURS = {"a": A, "b": B}
# Its config's spelling of rank, alpha and dropout, the one we write last: the manifest of its training has the others.
_FIELDS = {"lora_rank": ("lora_rank", "r"), "lora_alpha": ("lora_alpha",), "lora_dropout": ("lora_dropout",)}


def encode(state: AdapterState) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors as ``<path>.mindpet_delta_lora_a`` and the config.

    rsLoRA is written as the alpha that gives its scale, see `plain_alpha`.

    Raises:
        ValueError: the adapter holds what MindFormers cannot read, or layers differ in rank, alpha or dropout, of
            which its config has one each. All problems stand in one message.
    """
    problems = refusals(state, "MindFormers' files", (A, B), ("use_rslora",)) + without_settings(state)
    problems += not_dense(state, "MindFormers")
    if not problems:
        problems += _differences(state)
    if problems:
        raise ValueError("\n  ".join(problems))
    first = next(iter(state.layers.values())).settings or {}
    # No `peft_type`: PEFT refuses such a directory instead of missing its keys.
    config = {"r": first["lora_rank"], "lora_alpha": plain_alpha(first),
              "lora_dropout": first.get("lora_dropout", 0.0),
              "target_modules": sorted({path.rpartition(".")[2] for path in state.layers})}
    config.update({key: value for key, value in state.config.items() if key not in {*config, *PEFT_FIELDS}},
                  **{OWN_ENTRY: own_entry(state, {path: path for path in state.layers}, state.config)})
    return {f"{path}.{name}": value for path, layer in state.layers.items()
            for name, value in layer.tensors.items()}, config


def decode(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> AdapterState:
    """Return the adapter of MindFormers' files; without a config the settings are not known.

    Args:
        tensors: by `Parameter.name`, ``<path>.mindpet_delta_lora_a`` or ``<path>.lora_a``.
        config: of ``adapter_config.json``, or of the manifest of its training, where there is one.

    Raises:
        ValueError: a key of no LoRA layer, half a layer, a rank that the config does not say, or a config without
            numbers for rank and alpha. All problems stand in one message.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    problems: list[str] = []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"{key} is no tensor of a LoRA layer (expected <path>.mindpet_delta_lora_a or b, or "
                            f"<path>.lora_a or b).")
            continue
        name = _OURS[match["factor"].lower()]
        if name in layers.setdefault(match["path"], {}):
            problems.append(f"{key} stands twice in the file, in two spellings.")
        layers[match["path"]][name] = value
    if config is not None:
        config = config["lora_config"] if isinstance(config.get("lora_config"), dict) else config
    settings = None if config is None else _settings(config, problems)
    for path, parts in layers.items():
        problems += pair_problems(path, parts)
        if config is None and _is_transposed(parts):
            problems.append(f"{path}: lora_a of shape {parts[A].shape} looks like mlx-lm's, (in, rank): give the "
                            f"directory with its adapter_config.json.")
        rank = parts[A].shape[0] if A in parts and parts[A].ndim else None
        if settings is not None and rank is not None and settings["lora_rank"] not in (None, rank):
            problems.append(f"{path} has rank {rank}, but the config says {settings['lora_rank']}.")
    if not layers and not problems:
        problems.append("it holds no tensor.")
    if problems:
        raise ValueError("\n  ".join(problems))
    own, kept = read_own_entry((config or {}).get(OWN_ENTRY))
    found = {path: settled(LayerState(parts, settings and {**settings, "lora_rank": int(parts[A].shape[0])}),
                           own[path]["settings"] if path in own else None) for path, parts in layers.items()}
    ours = {"peft_type", "target_modules", OWN_ENTRY, *(name for names in _FIELDS.values() for name in names)}
    return AdapterState("lora", found, config=kept if own else {
        key: value for key, value in (config or {}).items() if key not in ours})


def _is_transposed(parts: Mapping[str, np.ndarray]) -> bool:
    """Tell whether factors fit both ways, and have a rank above the layer's sizes as they stand."""
    a, b = parts.get(A), parts.get(B)
    return a is not None and b is not None and a.ndim == 2 and a.shape == b.shape[::-1] and a.shape[0] > a.shape[1]


def _differences(state: AdapterState) -> list[str]:
    """Return where layers differ in what the config holds once."""
    problems = []
    for what, value in (("rank", lambda own: own["lora_rank"]), ("alpha", plain_alpha),
                        ("dropout", lambda own: own.get("lora_dropout", 0.0))):
        by_path = {path: value(layer.settings or {}) for path, layer in state.layers.items()}
        first = next(iter(by_path))
        other = next((path for path in by_path if by_path[path] != by_path[first]), None)
        if other is not None:
            problems.append(f"MindFormers' config has one {what} for all layers, but {first} has {by_path[first]} and "
                            f"{other} has {by_path[other]}.")
    return problems


def _settings(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return rank (None where the config leaves it to the tensors), alpha and dropout of the config."""
    found = {name: next((config[key] for key in keys if config.get(key) is not None), None)
             for name, keys in _FIELDS.items()}
    rank, alpha, dropout = found.values()
    if rank is not None and (type(rank) is not int or rank <= 0):
        problems.append(f"r must be a positive integer, but the config says {rank!r:.100}.")
    if not is_alpha(alpha):
        problems.append(f"lora_alpha must be a positive number below {MAX_ALPHA:g}, but the config says "
                        f"{alpha!r:.100}.")
    found["lora_dropout"] = dropout = 0.0 if dropout is None else dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout must be a number from 0 to 1, but the config says {dropout!r:.100}.")
    for name, unused in (("use_rslora", (False, None)), ("use_dora", (False, None)), ("lora_bias", (False, None)),
                         ("bias", ("none", None)), ("rank_pattern", ({}, None)), ("alpha_pattern", ({}, None)),
                         ("modules_to_save", (None, []))):
        if config.get(name) not in unused:
            problems.append(f"{name} = {config[name]!r} is not known to MindFormers, and not supported here.")
    return found
