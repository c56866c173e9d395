"""Whether the settings of an adapter's layers are what its readers and writers take them for."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.arguments import MAX_ALPHA, is_alpha
from mindpet_lite.formats.lora import EMBEDDING_A, EMBEDDING_B, TOKENS, A, B, is_stack, pair_problems
from mindpet_lite.formats.starts import takes_from_base
from mindpet_lite.formats.state import AdapterState, LayerState

# By the name of a setting of LoRA what it must be, in words and as a test.
_LORA: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lora_rank": ("a positive integer", lambda value: type(value) is int and 0 < value < 2 ** 31),
    "lora_alpha": (f"a number above 0 and below {MAX_ALPHA:g}", is_alpha),
    "lora_dropout": ("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value < 1),
    "init_lora_weights": ("true or the name of a start", lambda value: value is True or takes_from_base(value)),
    "target_parameter": ("the name of a Parameter", lambda value: isinstance(value, str) and bool(value)),
    **{name: ("true or false", lambda value: type(value) is bool) for name in ("use_rslora", "use_dora", "lora_bias")}}


def settings_problems(state: AdapterState) -> list[str]:
    """Return, a sentence each, what of an adapter that was read is not sound, so that nothing else need ask.

    A layer of LoRA has factors that belong together and, where its settings are known, their rank, an alpha and nothing
    that LoRA does not have; or numbers of tokens, and a row for each. Settings of other methods are plain values, which
    the method itself checks.
    """
    problems = []
    for path, layer in state.layers.items():
        method = layer.method or state.method
        if not layer.tensors:
            problems.append(f"{path} holds no tensor.")
        elif "+" in method:
            problems.append(f"{path} is of method {method!r:.60}, but a layer has one method.")
        elif method != "lora":
            problems += [f"{path}: {name} must be a number, a text, true, false, null or a list of numbers, but the "
                         f"file says {value!r:.60}." for name, value in (layer.settings or {}).items()
                         if not isinstance(value, (bool, int, float, str, type(None))) and not _are_numbers(value)]
        else:
            problems += _token_problems(path, layer) if TOKENS in layer.tensors else _lora_problems(path, layer)
    return problems


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) in (int, float) for item in value)


def _lora_problems(path: str, layer: LayerState) -> list[str]:
    problems = _factor_problems(path, layer.tensors)
    if layer.settings is None:
        return problems
    settings: Mapping[str, Any] = layer.settings
    problems += [f"{path}: the settings have no {name}." for name in ("lora_rank", "lora_alpha")
                 if name not in settings]
    problems += [f"{path}: LoRA has no setting {name!r:.60}." for name in settings if name not in _LORA]
    problems += [f"{path}: {name} must be {words}, but the file says {settings[name]!r:.60}."
                 for name, (words, is_good) in _LORA.items() if name in settings and not is_good(settings[name])]
    factor = layer.tensors.get(A, layer.tensors.get(EMBEDDING_A))
    is_of_stack = "target_parameter" in settings and {A, B} <= layer.tensors.keys() and not problems and is_stack(
        layer.tensors[A], layer.tensors[B], settings["lora_rank"])
    if not problems and not is_of_stack and factor is not None and factor.shape[0] != settings["lora_rank"]:
        problems.append(f"{path}: its factor A has the shape {factor.shape}, but the file says rank "
                        f"{settings['lora_rank']}.")
    return problems


def _factor_problems(path: str, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return why the factors of a layer are none; one that is missing is for those who know what the net has."""
    flat = [f"{path}.{name} has the shape {value.shape}, which no tensor of LoRA has."
            for name, value in tensors.items() if not value.ndim]
    if not flat and A in tensors and B in tensors:
        return pair_problems(path, tensors)
    if not flat and EMBEDDING_A in tensors and EMBEDDING_B in tensors:
        a, b = tensors[EMBEDDING_A], tensors[EMBEDDING_B]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            return [f"{path}: A of shape {a.shape} and B of shape {b.shape} do not belong together: the first axis of "
                    f"A and the second of B are the rank."]
    return flat


def _token_problems(path: str, layer: LayerState) -> list[str]:
    value = layer.tensors[TOKENS]
    if layer.settings is None:
        return [] if value.ndim == 2 else [f"{path}: trained tokens of shape {value.shape} are no rows of a table."]
    tokens = layer.settings.get("token_indices")
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        return [f"{path}: token_indices must be a list of token numbers, but the file says {tokens!r:.60}."]
    extra = [name for name in (*layer.tensors, *layer.settings) if name not in (TOKENS, "token_indices")]
    if value.ndim != 2 or len(value) != len(tokens) or extra:
        return [f"{path}: it trains {len(tokens)} tokens with values of shape {value.shape}"
                f"{f' and has {extra[0]!r:.60} besides' if extra else ''}: expected a row for each token alone."]
    return []
