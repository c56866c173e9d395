"""Hugging Face PEFT's adapters: the tensors by PEFT's keys, and its config."""
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.lora import TOKENS, is_stack, without_settings
from mindpet_lite.formats.peft_config import (
    RESTATED,
    config_of,
    mixed_fields,
    problems_of,
    settings_of,
    targets,
    tokens_of,
)
from mindpet_lite.formats.peft_keys import PREFIX, plain_keys, reads_as_lora
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.names.parameter_names import is_embedding, is_head, pytorch_name

# The methods that this format can hold.
METHODS = ("lora",)
# PEFT's name of each tensor of a layer, by ours.
_KEYS = {"mindpet_delta_lora_a": "lora_A.weight", "mindpet_delta_lora_b": "lora_B.weight",
         "mindpet_delta_lora_embedding_a": "lora_embedding_A", "mindpet_delta_lora_embedding_b": "lora_embedding_B",
         "mindpet_delta_lora_b_bias": "lora_B.bias", "mindpet_delta_lora_magnitude": "lora_magnitude_vector",
         TOKENS: "token_adapter.trainable_tokens_delta"}
# Older files call the magnitude's tensor a weight.
_OURS = {**{key: name for name, key in _KEYS.items()}, "lora_magnitude_vector.weight": "mindpet_delta_lora_magnitude"}
# The names of A and B: of every other layer, of an embedding; and what trained tokens are.
_LAYER, _TABLE, _TOKENS = tuple(_KEYS)[:2], tuple(_KEYS)[2:4], tuple(_KEYS)[6:]
_BASE = ".base_layer."
# What else PEFT writes of a module that is saved whole: with bias "all" the biases of the two modules that its wrapper
# holds, the base's and the one that trained, which stands in the file already; and the batches a BatchNorm has seen.
_COPY = ".modules_to_save."
_CARRIED = (_COPY, ".original_module.", ".num_batches_tracked.")


def can_hold(state: AdapterState) -> bool:
    """Tell whether PEFT's files can hold an adapter: of LoRA, without a base parameter whose name reads as a factor.

    A cell of the user's that is called ``lora_A`` and trains with the deltas has such a name. Nor may layers differ in
    what PEFT has one field for, as those of two configs may.
    """
    return (state.method in METHODS and not mixed_fields(state)
            and not any(reads_as_lora(f"{PREFIX}{pytorch_name(name)}") for name in state.trained))


def encode(state: AdapterState) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return PEFT's tensors by key and its config.

    The config that the adapter came with is kept as it is where it still tells the truth.

    Raises:
        ValueError: the adapter is of another method, or layers differ in what PEFT has one field for.
    """
    if state.method not in METHODS:
        raise ValueError(f"PEFT's files cannot hold an adapter of method {state.method!r}.")
    unknown = without_settings(state)
    if unknown:
        raise ValueError("\n  ".join(unknown))
    tensors = {f"{PREFIX}{path}.{_KEYS[name]}": value
               for path, layer in state.layers.items() for name, value in layer.tensors.items()}
    modules, biased = homes_of_trained(state)
    for name, value in state.trained.items():
        path, _, last = name.rpartition(".")
        inner = _BASE if path in state.layers else "."
        tensors[f"{PREFIX}{path}{inner}{pytorch_name(last)}"] = value
    tensors.update({key: tensors.get(key.replace(_COPY, "."), value) if _COPY in key else value
                    for key, value in state.carried.items()})
    bias = "none" if not biased else "lora_only" if biased <= set(state.layers) else "all"
    fields = config_of(state, sorted(modules), bias)
    kept = dict(state.config)
    if _still_true(kept, state, tensors):
        return tensors, kept
    return tensors, {**fields, **{name: value for name, value in kept.items() if name not in RESTATED},
                     **{name: fields.get(name) for name in RESTATED}}


def homes_of_trained(state: AdapterState) -> tuple[set[str], set[str]]:
    """Return the modules that are saved whole, and the modules with a trained bias."""
    ends = [(path, last) for path, _, last in (pytorch_name(name).rpartition(".") for name in state.trained)]
    modules = {path for path, last in ends if not last.endswith("bias") and path not in state.layers}
    return modules, {path for path, last in ends if last.endswith("bias") and path not in modules}


def _still_true(config: Mapping[str, Any], state: AdapterState, tensors: Mapping[str, np.ndarray]) -> bool:
    """Tell whether an adapter of this config and these tensors is `state`."""
    try:
        found = decode(tensors, config)
    except ValueError:
        return False
    return ({path: layer.settings for path, layer in found.layers.items()}
            == {path: layer.settings for path, layer in state.layers.items()}
            and set(found.trained) == {pytorch_name(name) for name in state.trained}
            and all(targets(path, config) for path, layer in state.layers.items()
                    if not {"token_indices", "target_parameter"} & (layer.settings or {}).keys()))


def decode(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> AdapterState:
    """Return the adapter that PEFT's tensors and config describe.

    An entry of modules_to_save of which the file holds nothing is passed over, as PEFT does: it writes "classifier" and
    "score" for tasks of classification, whatever the net has. `unsaved_modules` tells where the net has it.

    Raises:
        ValueError: the config is of another method or uses a field we cannot honour; a key is not LoRA's; the file
            holds several adapters; a layer lacks a factor; shapes and rank disagree. All problems stand in one message.
    """
    problems = problems_of(config)
    if problems:
        raise ValueError("\n  ".join(problems))
    layers: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    carried: dict[str, np.ndarray] = {}
    for key, value in plain_keys(tensors).items():
        path, name = _split(key)
        if name is not None:
            layers.setdefault(path, {})[name] = value
        elif is_carried(key, config):
            carried[key] = value
        else:
            others[key] = value
    if not layers and not others and not carried:
        problems.append("the file holds no tensor.")
    found = {path: _layer(path, parts, config, problems) for path, parts in layers.items()}
    tables = _tables(others, layers, config)
    trained = {place: value for key, value in others.items()
               if (place := _place_of_trained(key, layers, tables, config, problems)) is not None}
    if problems:
        raise ValueError("\n  ".join(problems))
    return AdapterState("lora", found, trained, dict(config), carried)


def unsaved_modules(state: AdapterState, paths: Iterable[str]) -> list[str]:
    """Return a sentence for each module of a net that PEFT would have saved whole, but of which the file holds nothing.

    Args:
        state: as `decode` gave it, under the net's paths.
        paths: of the net's modules that have parameters.
    """
    parts = (path.split(".") for path in paths)
    modules = {".".join(names[:end]) for names in parts for end in range(1, len(names) + 1)}
    # PEFT saves each module whose path ends so, also within a word.
    return [f"modules_to_save names {entry!r}, which {module} is, but the file holds nothing of it."
            for entry in _saved(state.config) for module in sorted(modules)
            if module.endswith(entry) and not any(_is_in(name, entry) for name in state.trained)]


def is_carried(key: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor of a module that is saved whole changes nothing."""
    heads = [f"{key}.".partition(part)[0] for part in _CARRIED if part in f"{key}."]
    return key.startswith(PREFIX) and any(_is_in(f"{head}.", entry) for head in heads for entry in _saved(config))


def _saved(config: Mapping[str, Any]) -> list[str]:
    """Return the entries of modules_to_save."""
    saved = config.get("modules_to_save") or []
    return [saved] if isinstance(saved, str) else saved


def _layer(path: str, parts: dict[str, np.ndarray], config: Mapping[str, Any], problems: list[str]) -> LayerState:
    if _TOKENS[0] in parts:
        tokens = tokens_of(path, config)
        if len(parts) > 1 or parts[_TOKENS[0]].shape[:1] != (len(tokens),):
            problems.append(f"{path} has trained tokens of shape {parts[_TOKENS[0]].shape} in the file, but "
                            f"{len(tokens)} in the config, or holds other tensors too.")
        return LayerState(parts, {"token_indices": tokens})
    names = _TABLE if any(name in parts for name in _TABLE) else _LAYER
    wanted = [*names, *(["mindpet_delta_lora_magnitude"] if config.get("use_dora") else []),
              *(["mindpet_delta_lora_b_bias"] if config.get("lora_bias") and names == _LAYER else [])]
    settings = settings_of(path, config, names == _LAYER)
    missing = [_KEYS[name] for name in wanted if name not in parts]
    if missing:
        problems.append(f"{path} lacks {', '.join(missing)}.")
    elif set(parts) != set(wanted):
        extra = ", ".join(_KEYS[name] for name in parts if name not in wanted)
        problems.append(f"{path} has {extra}, which its config does not go with.")
    elif not _rank_fits(parts[names[0]], parts[names[1]], settings["lora_rank"]) and not (
            settings.get("target_parameter") and is_stack(parts[names[0]], parts[names[1]], settings["lora_rank"])):
        problems.append(f"{path}: lora_A of shape {parts[names[0]].shape} and lora_B of shape {parts[names[1]].shape} "
                        f"do not fit rank {settings['lora_rank']} of the config.")
    return LayerState(parts, settings)


def path_of_trained(key: str, config: Mapping[str, Any]) -> str | None:
    """Return the path of a base parameter that modules_to_save names, or None for another key."""
    place = key.removeprefix(PREFIX)
    return place if key.startswith(PREFIX) and any(_is_in(place, entry) for entry in _saved(config)) else None


def _tables(others: Mapping[str, np.ndarray], layers: Collection[str], config: Mapping[str, Any]) -> set[str]:
    """Return the paths of the embedding and the output layer that PEFT wrote along (save_embedding_layers).

    PEFT writes all parameters of what `get_input_embeddings` and `get_output_embeddings` give. They are known by their
    names (`parameter_names`); under other names by being two, with matrices of one shape.
    """
    shapes = {path: value.shape for key, value in others.items()
              if (path := key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(_BASE[:-1])) not in layers
              and key.endswith(".weight") and value.ndim == 2
              and not any(_is_in(f"{path}.", entry) for entry in _saved(config))}
    known = {path for path in shapes if is_embedding(path) or is_head(path)}
    return set(shapes) if len(shapes) == 2 and len(set(shapes.values())) == 1 else known


def _place_of_trained(key: str, layers: Collection[str], tables: Collection[str], config: Mapping[str, Any],
                      problems: list[str]) -> str | None:
    """Return the path of a base parameter that came with the deltas; None, and a problem, for what the config lacks."""
    name = key.removeprefix(PREFIX)
    path, is_base, last = name.partition(_BASE)
    place = f"{path}.{last}" if is_base else name
    owner, _, last = place.rpartition(".")
    if is_base and last == "weight" and owner in layers or owner in tables and last in ("weight", "bias"):
        # PEFT writes the weights of adapted embeddings and output layers along, and those of a base whose vocabulary
        # was resized, and takes them over when it reads the file.
        return place
    whole = any(_is_in(place, entry) for entry in _saved(config))
    if key.startswith(PREFIX) and (whole or config.get("bias") in ("all", "lora_only") and place.endswith("bias")):
        return place
    problems.append(f"{key} is no tensor of a LoRA layer (expected {PREFIX}<path>.lora_A.weight or lora_B, or "
                    f"lora_embedding_A or B), and the config names it neither in modules_to_save nor in bias.")
    return None


def _is_in(name: str, module: str) -> bool:
    """Tell whether a parameter is below a module whose path ends so; PEFT takes any end, also of a longer name."""
    return f"{module}." in name


def _rank_fits(a: np.ndarray, b: np.ndarray, rank: int) -> bool:
    """Tell whether A leads to `rank` and B from there: matrices, or convolutions with a B of kernel size 1."""
    if a.ndim != b.ndim or a.ndim < 2 or a.shape[0] != rank or any(size != 1 for size in b.shape[2:]):
        return False
    # With groups, each of a convolution's outputs sees its group's share of the rank.
    return b.shape[1] == rank or a.ndim > 2 and b.shape[1] > 0 and rank % b.shape[1] == 0


def _split(key: str) -> tuple[str, str | None]:
    """Return the layer's path and our tensor name for a PEFT key; the name is None for a key of no LoRA layer."""
    for suffix, name in _OURS.items():
        if key.startswith(PREFIX) and key.endswith("." + suffix):
            return key[len(PREFIX):-len(suffix) - 1], name
    return key, None
