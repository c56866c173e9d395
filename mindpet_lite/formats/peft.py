"""Hugging Face PEFT's adapters: the tensors by PEFT's keys, and its config."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.patterns import compile_end
from mindpet_lite.formats.state import AdapterState, LayerState

# The methods that this format can hold.
METHODS = ("lora",)
_PREFIX = "base_model.model."
# PEFT's name of each tensor of a layer, by ours.
_KEYS = {"mindpet_delta_lora_a": "lora_A.weight", "mindpet_delta_lora_b": "lora_B.weight",
         "mindpet_delta_lora_embedding_a": "lora_embedding_A", "mindpet_delta_lora_embedding_b": "lora_embedding_B"}
# The names of A and B: of every other layer, of an embedding.
_LAYER, _TABLE = tuple(_KEYS)[:2], tuple(_KEYS)[2:]
# PEFT writes the table of an adapted embedding along. It is the base's own, and the net has it.
_TABLE_COPY = ".base_layer.weight"
_OURS = {key: name for name, key in _KEYS.items()}
# Fields that change what an adapter computes and that a plain LoRA of Dense layers cannot express, with the values
# that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "use_rslora": (False, None), "lora_bias": (False, None), "bias": ("none", None),
    "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "layer_replication": (None,),
    "trainable_token_indices": (None, [], {}), "target_parameters": (None, []), "alora_invocation_tokens": (None,),
    "use_qalora": (False, None), "use_bdlora": (None, False), "arrow_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,), "megatron_config": (None,),
}


def encode(state: AdapterState) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return PEFT's tensors by key and its config; the most common rank and alpha go to `r` and `lora_alpha`."""
    if state.method not in METHODS:
        raise ValueError(f"PEFT's files cannot hold an adapter of method {state.method!r}.")
    tensors = {f"{_PREFIX}{path}.{_KEYS[name]}": value
               for path, layer in state.layers.items() for name, value in layer.tensors.items()}
    settings = {path: layer.settings or {} for path, layer in state.layers.items()}
    # An embedding has no dropout.
    common = {name: Counter([item[name] for item in settings.values() if name in item] or [0.0]).most_common(1)[0][0]
              for name in ("lora_rank", "lora_alpha", "lora_dropout")}
    config = {
        "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": None, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "r": common["lora_rank"], "lora_alpha": common["lora_alpha"], "lora_dropout": common["lora_dropout"],
        "target_modules": sorted(settings), "modules_to_save": None, "task_type": None, "revision": None,
        "rank_pattern": {_pattern(path, settings): item["lora_rank"] for path, item in settings.items()
                         if item["lora_rank"] != common["lora_rank"]},
        "alpha_pattern": {_pattern(path, settings): item["lora_alpha"] for path, item in settings.items()
                          if item["lora_alpha"] != common["lora_alpha"]},
        "use_rslora": False, "use_dora": False, "lora_bias": False,
    }
    return tensors, config


def decode(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> AdapterState:
    """Return the adapter that PEFT's tensors and config describe.

    Raises:
        ValueError: the config is of another method or uses a field we cannot honour; a key is not LoRA's; a layer
            lacks a factor; shapes and rank disagree. All problems stand in one message.
    """
    problems = _config_problems(config)
    if problems:
        raise ValueError("\n  ".join(problems))
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        path, name = _split(key)
        if name is not None:
            layers.setdefault(path, {})[name] = value
        elif f"{key.removesuffix(_TABLE_COPY)}.lora_embedding_A" not in tensors:
            problems.append(f"{key} is no tensor of a LoRA layer (expected {_PREFIX}<path>.lora_A.weight or lora_B, "
                            f"or lora_embedding_A or B).")
    if not layers and not problems:
        problems.append("the file holds no tensor.")
    found: dict[str, LayerState] = {}
    for path, parts in layers.items():
        names = _TABLE if any(name in parts for name in _TABLE) else _LAYER
        missing = [_KEYS[name] for name in names if name not in parts]
        if missing or len(parts) != len(names):
            problems.append(f"{path} lacks {', '.join(missing)}." if missing else f"{path} has two kinds of factors.")
            continue
        rank = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
        a, b = (parts[name] for name in names)
        if not _rank_fits(a, b, rank):
            problems.append(f"{path}: lora_A of shape {a.shape} and lora_B of shape {b.shape} do not fit rank {rank} "
                            f"of the config.")
        found[path] = LayerState(parts, {
            "lora_rank": rank, "lora_alpha": _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha")),
            **({"lora_dropout": config.get("lora_dropout") or 0.0} if names == _LAYER else {})})
    if problems:
        raise ValueError("\n  ".join(problems))
    return AdapterState("lora", found)


def _rank_fits(a: np.ndarray, b: np.ndarray, rank: int) -> bool:
    """Tell whether A leads to `rank` and B from there: matrices, or convolutions with a B of kernel size 1."""
    if a.ndim != b.ndim or a.ndim < 2 or a.shape[0] != rank or any(size != 1 for size in b.shape[2:]):
        return False
    # With groups, each of a convolution's outputs sees its group's share of the rank.
    return b.shape[1] == rank or a.ndim > 2 and b.shape[1] > 0 and rank % b.shape[1] == 0


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    if config.get("peft_type") != "LORA":
        return [f"peft_type must be 'LORA', but the config says {config.get('peft_type')!r}."]
    problems = [f"{name} = {config[name]!r} is not supported." for name, unused in _UNUSED.items()
                if name in config and config[name] not in unused]
    for name, patterns, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float))):
        by_pattern = config.get(patterns) or {}
        if not isinstance(by_pattern, dict):
            problems.append(f"{patterns} must be an object, but the config says {by_pattern!r}.")
            by_pattern = {}
        for place, value in ((name, config.get(name)), *((f"{patterns}[{key!r}]", by_pattern[key])
                                                         for key in by_pattern)):
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 1e9:
                problems.append(f"{place} must be a positive number, but the config says {value!r}.")
        for key in by_pattern:
            try:
                compile_end(key)
            except ValueError as error:
                problems.append(f"{patterns}[{key!r}] {error}")
    return problems


def _pattern(path: str, others: Iterable[str]) -> str:
    """Return the pattern that means `path` and no other layer: PEFT matches it with the end of every path."""
    return path if all(other == path or _by_pattern({path: True}, other, False) is False for other in others) \
        else f"^{re.escape(path)}$"


def _split(key: str) -> tuple[str, str | None]:
    """Return the layer's path and our tensor name for a PEFT key; the name is None for a key of no LoRA layer."""
    for suffix, name in _OURS.items():
        if key.startswith(_PREFIX) and key.endswith("." + suffix):
            return key[len(_PREFIX):-len(suffix) - 1], name
    return key, None


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of `path`, as PEFT does, else `default`."""
    for pattern, value in (patterns or {}).items():
        if compile_end(pattern).fullmatch(path):
            return value
    return default
