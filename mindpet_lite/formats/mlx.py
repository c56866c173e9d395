"""mlx-lm's LoRA adapters: ``adapters.safetensors``, and beside it ``adapter_config.json``.

A layer computes x W^T + scale * (x lora_a) lora_b, with lora_a of shape (in, rank) and lora_b of shape (rank, out), so
that they are the transposes of A and B. DoRA's magnitude is ``m``, one number per output.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindpet_lite.arguments import MAX_ALPHA, is_alpha
from mindpet_lite.formats.lora import MAGNITUDE, A, B
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.names.parameter_names import is_embedding

_OURS = {"lora_a": A, "lora_b": B, "m": MAGNITUDE}


def decode(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> AdapterState:
    """Return the adapter of mlx-lm's files.

    Args:
        tensors: by key, ``<path>.lora_a``, ``<path>.lora_b`` and with DoRA ``<path>.m``.
        config: of ``adapter_config.json``, with `fine_tune_type` and `lora_parameters`.

    Raises:
        ValueError: the config does not say rank and scale, or is not of LoRA or DoRA; a key is not LoRA's; a layer is
            not whole; shapes and rank disagree. All problems stand in one message.
    """
    problems: list[str] = []
    settings = _settings(config, problems)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        path, _, last = key.rpartition(".")
        if last not in _OURS or not path or last == "m" and "use_dora" not in settings:
            problems.append(f"{key} is no tensor of a LoRA layer (expected <path>.lora_a or lora_b, with "
                            f"fine_tune_type 'dora' also <path>.m): parameters that train whole are not read here.")
        else:
            layers.setdefault(path, {})[_OURS[last]] = value if last == "m" else value.T
    for path, parts in layers.items():
        problems += _layer_problems(path, parts, settings)
    if not layers and not problems:
        problems.append("it holds no tensor.")
    if problems:
        raise ValueError("\n  ".join(problems))
    return AdapterState("lora", {path: LayerState({name: np.ascontiguousarray(value) for name, value in parts.items()},
                                                  dict(settings)) for path, parts in layers.items()})


def _settings(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the settings of every layer: alpha is scale * rank."""
    # The first versions do not say it: they had LoRA alone.
    kind, found = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        problems.append(f"fine_tune_type must be 'lora' or 'dora', but the config says {kind!r:.40}.")
    if not isinstance(found, Mapping):
        problems.append(f"lora_parameters must be an object with rank and scale, but the config says {found!r:.60}.")
        return {}
    rank, scale, dropout = found.get("rank"), found.get("scale"), found.get("dropout") or 0.0
    if type(rank) is not int or not 0 < rank < 1e9:
        problems.append(f"rank must be a positive integer, but the config says {rank!r:.40}.")
        return {}
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not is_alpha(scale * rank):
        problems.append(f"scale must be a positive number, and times the rank below {MAX_ALPHA:g}, but the config says "
                        f"{scale!r:.40}.")
        return {}
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        problems.append(f"dropout must be a number from 0 to 1, but the config says {dropout!r:.40}.")
    # The first versions scaled by scale * alpha / rank.
    if found.get("alpha") not in (None, rank):
        problems.append(f"lora_parameters has alpha = {found['alpha']!r:.40} beside the scale, which first versions of "
                        f"mlx-lm multiplied it with (alpha / rank) and later ones ignore: set scale to what it was "
                        f"trained with, and remove alpha.")
    return {"lora_rank": rank, "lora_alpha": scale * rank, "lora_dropout": dropout,
            **({"use_dora": True} if kind == "dora" else {})}


def _layer_problems(path: str, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> list[str]:
    wanted = [A, B, *([MAGNITUDE] if "use_dora" in settings else [])]
    missing = [key for key, name in _OURS.items() if name in wanted and name not in parts]
    if missing:
        return [f"{path} lacks {', '.join(missing)}."]
    if is_embedding(path):
        return [f"{path}: mlx-lm's LoRA of an embedding also changes the output layer that is tied to it, which "
                f"cannot be expressed."]
    a, b = parts[A], parts[B]
    rank = settings.get("lora_rank")
    if a.ndim == 3:
        return [f"{path}: LoRA of a layer of experts (lora_a of shape {a.shape[::-1]}) cannot be read here."]
    if a.ndim != 2 or b.ndim != 2 or rank is not None and (a.shape[0], b.shape[1]) != (rank, rank):
        return [f"{path}: lora_a of shape {a.shape[::-1]} and lora_b of shape {b.shape[::-1]} do not fit rank {rank} "
                f"of the config: expected (in, rank) and (rank, out)."]
    if MAGNITUDE in wanted and parts[MAGNITUDE].shape != b.shape[:1]:
        return [f"{path}: m of shape {parts[MAGNITUDE].shape} is not one number for each of the {b.shape[0]} outputs."]
    return []
