"""What the file formats of LoRA share: our names of its tensors, checks, and what a format has no place for."""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mindpet_lite.arguments import MAX_ALPHA, is_alpha
from mindpet_lite.formats.files import as_float, check_name
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.strict_json import parse_object

A, B = "mindpet_delta_lora_a", "mindpet_delta_lora_b"
EMBEDDING_A, EMBEDDING_B = "mindpet_delta_lora_embedding_a", "mindpet_delta_lora_embedding_b"
TOKENS = "mindpet_delta_lora_tokens"
MAGNITUDE, B_BIAS = "mindpet_delta_lora_magnitude", "mindpet_delta_lora_b_bias"
WORDS = {A: "factor A", B: "factor B", EMBEDDING_A: "an embedding's factor A", EMBEDDING_B: "an embedding's factor B",
         MAGNITUDE: "DoRA's magnitude", B_BIAS: "the bias of B (lora_bias)",
         TOKENS: "tokens that train (trainable_token_indices)"}
# Under this name our files hold, beside what the format has a place for, each layer's path and settings and the config.
OWN_ENTRY = "mindpet_lite"
# The fields of the LoraConfig of PEFT 0.21.
PEFT_FIELDS = frozenset("""
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version qalora_group_size r
    rank_pattern revision target_modules target_parameters task_type trainable_token_indices use_bdlora use_dora
    use_qalora use_rslora velora_config""".split())


def pair_problems(path: str, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return why the factors of a Dense or convolution do not belong together; empty if they do."""
    missing = [WORDS[name] for name in (A, B) if name not in tensors]
    if missing:
        return [f"{path} lacks {' and '.join(missing)}."]
    a, b = tensors[A], tensors[B]
    rank = a.shape[0] if a.ndim else 0
    # A grouped convolution shares the rank out between its groups.
    fits = a.ndim == b.ndim and a.ndim >= 2 and rank > 0 and b.shape[1] > 0 and \
        (rank == b.shape[1] if a.ndim == 2 else rank % b.shape[1] == 0)
    return [] if fits else [f"{path}: A of shape {a.shape} and B of shape {b.shape} do not belong together: the first "
                            f"axis of A and the second of B are the rank."]


def is_stack(a: np.ndarray, b: np.ndarray, rank: int) -> bool:
    """Tell whether A (experts · rank, in) and B (out, rank · experts) are those of a stack of matrices."""
    return a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0


def refusals(state: AdapterState, target: str, tensors: Collection[str], settings: Collection[str]) -> list[str]:
    """Return what of a LoRA adapter the files of `target` cannot hold: one sentence each.

    Args:
        state: the adapter.
        target: the format, as it stands in a sentence.
        tensors: our names of the tensors of a layer that the format holds.
        settings: names of the settings that it can express beside rank, alpha and dropout, which never changes what
            a trained adapter computes.
    """
    if state.method != "lora":
        return [f"{target} hold LoRA only, but this adapter is of method {state.method!r}."]
    problems = ["it holds no layer."] if not state.layers else []
    problems += [f"{name}: {target} have no place for a base parameter that trained beside the deltas."
                 for name in state.trained]
    for path, layer in state.layers.items():
        problems += [f"{path}: {target} have no place for {WORDS.get(name, name)}."
                     for name in layer.tensors if name not in tensors]
        own = layer.settings or {}
        known = {"lora_rank", "lora_alpha", "lora_dropout", *settings}
        problems += [f"{path}: {target} cannot say {name}={value!r}." for name, value in own.items()
                     if name not in known and value]
        if bool(own.get("use_dora")) != (MAGNITUDE in layer.tensors) and layer.settings is not None:
            problems.append(f"{path}: use_dora={own.get('use_dora')!r} does not fit its tensors "
                            f"{', '.join(sorted(layer.tensors))}.")
        problems += pair_problems(path, layer.tensors) if {A, B} & layer.tensors.keys() else []
    return problems


def not_dense(state: AdapterState, target: str) -> list[str]:
    """Return a sentence for each convolution, for tools that have LoRA on dense layers only."""
    return [f"{path}: {target} has LoRA on dense layers only, but A is of shape {layer.tensors[A].shape}."
            for path, layer in state.layers.items() if A in layer.tensors and layer.tensors[A].ndim != 2]


def without_settings(state: AdapterState) -> list[str]:
    """Return a sentence for each layer whose rank and alpha are not known, for formats that must say them."""
    return [f"{path}: rank and alpha are not known (the file it came from does not say them); load it into a net that "
            f"was adapted as in training, and save that." for path, layer in state.layers.items()
            if layer.settings is None]


def plain_alpha(settings: Mapping[str, Any]) -> float:
    """Return the alpha that gives the layer's scale where the scale is alpha / rank.

    rsLoRA's scale is alpha / sqrt(rank) (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732), so that the result is
    alpha · sqrt(rank): exact where the rank is a square, else the nearest float64 to it, which no scale in float32
    can tell from the exact one.

    Raises:
        ValueError: it is more than files may say.
    """
    alpha = settings["lora_alpha"]
    plain = alpha * math.sqrt(settings["lora_rank"]) if settings.get("use_rslora") else alpha
    if not is_alpha(plain):
        raise ValueError(f"alpha would be {plain!r:.60} where the scale is alpha / rank, but files hold numbers above "
                         f"0 and below {MAX_ALPHA:g}.")
    return plain


def read_alpha(path: str, tensor: np.ndarray, rank: int) -> float:
    """Return the alpha of a layer from its tensor; whole numbers as int, as configs spell them.

    Zero means the rank, as for kohya's trainer (a network made with alpha 0 has alpha = rank).

    Raises:
        ValueError: it is not one positive number below `MAX_ALPHA`.
    """
    tensor = as_float(tensor)
    if tensor.size != 1 or tensor.dtype.kind not in "fiu" or not 0 <= (value := float(tensor.reshape(()))) < MAX_ALPHA:
        raise ValueError(f"{path}: alpha must be one positive number below {MAX_ALPHA:g}, but is {tensor!r:.60}.")
    return (int(value) if value.is_integer() else value) or rank


def own_entry(state: AdapterState, names: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `OWN_ENTRY` holds: by the format's `names` of the paths each layer's path and settings, `config`."""
    return {"layers": {names[path]: {"path": path, "settings": layer.settings}
                       for path, layer in state.layers.items()}, "config": dict(config)}


def read_own_entry(found: str | Mapping[str, Any] | None) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the layers and the config of an entry, a JSON text or an object; both empty where there is none.

    Raises:
        ValueError: the entry is not as `own_entry` makes it.
    """
    if found is None:
        return {}, {}
    try:
        entry = parse_object(found.encode()) if isinstance(found, str) else found
        layers, config = entry["layers"], entry["config"]
        sound = isinstance(config, dict) and all(
            isinstance(name, str) and isinstance(layer["path"], str) and isinstance(layer["settings"], dict)
            for name, layer in layers.items())
        for layer in layers.values():
            check_name(layer["path"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its entry {OWN_ENTRY!r:.100} is damaged: {error!r}.") from error
    if not sound:
        raise ValueError(f"its entry {OWN_ENTRY!r:.100} is damaged: each layer needs a path and settings.")
    return layers, config


def settled(layer: LayerState, own: Mapping[str, Any] | None) -> LayerState:
    """Return the layer with the settings that we wrote beside it, if they say what the file itself says.

    A tool that changed the file may have kept them as they were: then what the file itself says counts.
    """
    if own is None or layer.settings is None:
        return layer
    try:
        same = (own["lora_rank"] == layer.settings["lora_rank"] and plain_alpha(own) == layer.settings["lora_alpha"]
                and bool(own.get("use_dora")) == bool(layer.settings.get("use_dora")))
    except (KeyError, TypeError, ValueError, OverflowError):
        same = False
    return LayerState(layer.tensors, dict(own)) if same else layer
