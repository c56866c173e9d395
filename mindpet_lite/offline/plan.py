"""Which tensors of a base an adapter changes, and how; all that can be wrong is said before anything is written."""
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.adapters import LORA, Methods
from mindpet_lite.formats.files import as_float, type_name
from mindpet_lite.formats.float8 import FLOAT8
from mindpet_lite.formats.lora import B_BIAS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKENS, A, B, pair_problems
from mindpet_lite.formats.peft import unsaved_modules
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.values import eight_bit_problems
from mindpet_lite.offline.base import WEIGHTS, Base
from mindpet_lite.offline.changes import Added, Chain, Change, LowRank, Replaced
from mindpet_lite.offline.float8 import SCALES, find_scale, requantised
from mindpet_lite.offline.initials import residual_of
from mindpet_lite.offline.model_config import is_quantised
from mindpet_lite.offline.numbers import FLOATS
from mindpet_lite.offline.orientation import inputs_first
from mindpet_lite.offline.remade import remade

_KNOWN = {A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, B_BIAS, TOKENS}
# What stands beside a quantised weight, or for it, below a layer.
_QUANTISED = ("qweight", "qzeros", "SCB", "weight_format", "weight_packed", *SCALES)
# What a checkpoint of a whole net holds beside its base where the net was adapted.
_ADAPTED = re.compile(r"(.*\.)?(mindpet_delta_\w+|lora_scaling|lora_(embedding_)?[AB](\..+)?|base_layer\..+)")


def plan(state: AdapterState, base: Base, methods: Methods = LORA) -> dict[str, Change]:
    """Return what the adapter makes of each tensor that it changes, by the base's names.

    Args:
        state: the adapter, under the base's names.
        base: the base it was trained on.
        methods: by name, those that the adapter may be of.

    Raises:
        ValueError: the adapter does not fit the base or cannot be merged. All problems of a kind stand in one message.
    """
    kind = methods.get(state.method)
    method = getattr(kind, "layer", None)
    if state.method != "lora" and method is None:
        raise ValueError(f"an adapter of method {state.method!r} cannot be merged file to file: load it into the net "
                         f"and use mindpet_lite.merge().")
    _check_plain(base)
    found: dict[str, list[Change]] = {}
    problems = eight_bit_problems(state) + unsaved_modules(state, base.owners)
    if problems:
        raise ValueError("\n  ".join(problems))
    # Before the deltas: PEFT's file of an adapted embedding holds the table that its delta is on.
    for name, value in state.trained.items():
        try:
            found[_trained(name, value, base)] = [Replaced(value)]
        except ValueError as error:
            problems.append(f"{name}: {error}")
    shared = state.shared if kind is None or kind.peft is None else kind.peft.drawn(state, _shapes(state, base))
    for path, layer in state.layers.items():
        try:
            own = _of_layer(path, layer, state, base) if method is None else remade(
                layer, shared, _weight(path, base),
                inputs_first(path, base.config, state.config.get("fan_in_fan_out")), method, base)
            for name, change in own.items():
                found.setdefault(name, []).append(change)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ValueError("\n  ".join(problems))
    changes: dict[str, Change] = {name: chain[0] if len(chain) == 1 else Chain(tuple(chain))
                                  for name, chain in found.items()}
    for name in [name for name in changes if base.dtype(name) in FLOAT8]:
        change, scale = requantised(name, changes[name], base)
        changes[name] = change
        if scale is not None:
            changes[change.scale.name] = Replaced(scale)
    return changes


def _check_plain(base: Base) -> None:
    """Refuse a base that is not one, or that says it is quantised where no tensor shows which layers are."""
    adapted = [name for name in base.names() if _ADAPTED.fullmatch(name)]
    if adapted:
        raise ValueError(f"the base holds an adapter itself ({listed(adapted, 3)}): it is a checkpoint of a whole net "
                         f"that was adapted. Give the base without it, or what mindpet_lite.merge() makes of that net.")
    shown = any(base.dtype(name) not in FLOATS or name.rpartition(".")[2] in _QUANTISED for name in base.names())
    if is_quantised(base.config) and not shown:
        raise ValueError("the base is quantised (its config.json has a quantization_config, though none of its tensors "
                         "is): merge onto the base it was quantised from, and quantise the result.")


def scale_of(settings: Mapping[str, Any]) -> float:
    """Return s of s · B A: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
    rank, alpha = settings["lora_rank"], settings["lora_alpha"]
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_layer(path: str, layer: LayerState, state: AdapterState, base: Base) -> dict[str, Change]:
    """Return what a layer's delta changes."""
    if layer.settings is None:
        raise ValueError("rank and alpha are not known, for the file does not say them; load it into a net that was "
                         "adapted as in training, and merge that.")
    unknown = sorted(set(layer.tensors) - _KNOWN)
    if unknown:
        raise ValueError(f"it holds {', '.join(unknown)}, which cannot be merged.")
    broken = [name for name, value in layer.tensors.items() if not np.isfinite(as_float(value)).all()]
    if broken:
        raise ValueError(f"{', '.join(broken)} holds NaN or infinite values.")
    parameter = layer.settings.get("target_parameter", "weight")
    if parameter != "weight" or "target_parameter" in layer.settings and not _is_matrix(layer):
        raise ValueError(f"it adapts the Parameter {parameter!r:.100} of a cell (target_parameters), which is not "
                         f"merged file to file: load it into the net, and merge() that.")
    weight = _weight(path, base)
    if TOKENS in layer.tensors:
        return {weight: _tokens(layer, base.shape(weight))}
    scale = scale_of(layer.settings)
    factor = layer.tensors.get(A, layer.tensors.get(EMBEDDING_A))
    if factor is not None and factor.shape[:1] != (layer.settings["lora_rank"],):
        raise ValueError(f"its factor A has the shape {factor.shape}, but the file says rank "
                         f"{layer.settings['lora_rank']}.")
    in_by_out = inputs_first(path, base.config, state.config.get("fan_in_fan_out"))
    left, right, in_rows = _oriented(layer, base.shape(weight), in_by_out, scale)
    # PEFT starts embeddings in its plain way whatever the config says.
    is_plain = EMBEDDING_A in layer.tensors or layer.settings.get("residual_base")
    start = None if is_plain else layer.settings.get("init_lora_weights")
    residual = residual_of(start, layer.settings["lora_rank"], scale, in_rows)
    magnitude = layer.tensors.get(MAGNITUDE)
    if magnitude is not None:
        magnitude = _flat_magnitude(magnitude, left.shape[0] if in_rows else right.shape[1])
    found: dict[str, Change] = {weight: LowRank(left, right, magnitude, in_rows, residual)}
    if B_BIAS in layer.tensors:
        found.update(_bias(path, scale * as_float(layer.tensors[B_BIAS]).astype(np.float32), base))
    return found


def _shapes(state: AdapterState, base: Base) -> list[tuple[int, ...]]:
    """Return the shape of each adapted layer's weight with the outputs first; none where the base has none."""
    weights = {path: base.weight_of(path) for path in state.layers}
    turned = state.config.get("fan_in_fan_out")
    return [base.shape(name)[::-1] if inputs_first(path, base.config, turned) else base.shape(name)
            for path, name in weights.items() if name is not None]


def _is_matrix(layer: LayerState) -> bool:
    """Tell whether an adapted Parameter is one matrix, and no stack of them."""
    return A in layer.tensors and layer.tensors[A].shape[0] == (layer.settings or {})["lora_rank"]


def _weight(path: str, base: Base) -> str:
    """Return the name of a layer's weight, having refused a quantised one."""
    weight = base.weight_of(path)
    if weight is None:
        stored = [name for name in base.owners.get(path, {}) if name in _QUANTISED]
        raise ValueError(f"the base is quantised ({', '.join(stored)}): merge onto the base it was quantised from."
                         if stored else "the base has no weight there.")
    _check_values(weight, base)
    return weight


def _check_values(weight: str, base: Base) -> None:
    """Refuse a parameter whose values are not known."""
    if base.dtype(weight) in FLOAT8:
        find_scale(weight, base)
        return
    quantised = [name for name in _QUANTISED if name in base.owners[weight.rpartition(".")[0]]]
    if base.dtype(weight) not in FLOATS or quantised and weight.rpartition(".")[2] in WEIGHTS:
        raise ValueError(f"the base is quantised ({weight} is {type_name(base.dtype(weight))}"
                         f"{''.join(f', with {name} beside it' for name in quantised)}): merge onto the base it was "
                         f"quantised from.")


def _tokens(layer: LayerState, shape: tuple[int, ...]) -> Replaced:
    rows, value = (layer.settings or {}).get("token_indices"), layer.tensors[TOKENS]
    if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
        raise ValueError(f"token_indices must be a list of token numbers, but the file says {rows!r:.100}.")
    if len(shape) != 2 or value.shape != (len(rows), shape[1]) or max(rows, default=0) >= shape[0]:
        raise ValueError(f"it trains the tokens {rows} with values of shape {value.shape}, which the table of shape "
                         f"{shape} does not have.")
    return Replaced(value, rows)


def _oriented(layer: LayerState, shape: tuple[int, ...], in_by_out: bool | None,
              scale: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return L and R with W + L R for a weight of `shape`, and whether its outputs are its rows.

    The shape decides where it allows one way only; `in_by_out` is as `orientation.inputs_first` returns it.
    """
    is_table = EMBEDDING_A in layer.tensors
    names = (EMBEDDING_A, EMBEDDING_B) if is_table else (A, B)
    if any(name not in layer.tensors for name in names):
        raise ValueError("it lacks one of its factors.")
    a, b = (as_float(layer.tensors[name]).astype(np.float32) for name in names)
    problems = [] if is_table else pair_problems("it", {A: a, B: b})
    if problems:
        raise ValueError(problems[0])
    if a.ndim > 2 and b.shape[1] != a.shape[0]:
        raise ValueError("with groups the update makes each output depend on every input channel, which a kernel of "
                         "as many groups cannot hold; use it unmerged.")
    update = (b.shape[0], *a.shape[1:])
    as_it_is = update == shape and not is_table
    # A convolution may have fewer axes elsewhere: 1x1 as a dense layer, one-dimensional ones with a kernel (1, k).
    if len(update) != len(shape) and not is_table:
        as_it_is = _without_ones(update) == _without_ones(shape)
    turned = len(shape) == 2 and update[:2][::-1] == shape and set(update[2:]) <= {1}
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1) * np.float32(scale)
    if as_it_is and turned and in_by_out is None:
        raise ValueError(f"its weight of shape {shape} may lie as (out, in) or, as GPT-2's Conv1D, as (in, out), and "
                         f"what would tell is missing or disagrees (the model_type in a config.json beside the base; "
                         f"fan_in_fan_out of the adapter): put the base's own config.json beside it.")
    if turned and (is_table or in_by_out or in_by_out is None and not as_it_is):
        return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), False
    if not as_it_is:
        raise ValueError(f"the adapter's update has the shape {update[::-1] if is_table else update}, but the base's "
                         f"weight has {shape}.")
    return b, a, True


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return *shape[:2], *(length for length in shape[2:] if length != 1)


def _flat_magnitude(magnitude: np.ndarray, outputs: int) -> np.ndarray:
    if magnitude.size != outputs:
        raise ValueError(f"DoRA's magnitude of shape {magnitude.shape} is not one number for each of the {outputs} "
                         f"outputs.")
    return as_float(magnitude).astype(np.float32).reshape(-1)


def _bias(path: str, update: np.ndarray, base: Base) -> dict[str, Change]:
    name = base.parameter(f"{path}.bias")
    if name is None:
        raise ValueError("it has a bias of B (lora_bias), but the base has no bias there that could take it up.")
    if base.shape(name) != update.shape:
        raise ValueError(f"its bias of B has the shape {update.shape}, but {name} has {base.shape(name)}.")
    return {name: Added(update)}


def _trained(name: str, value: np.ndarray, base: Base) -> str:
    """Return the base's name of a parameter that trained beside the deltas."""
    own = base.parameter(name)
    if own is None:
        raise ValueError("it trained beside the deltas, but the base does not have it.")
    if base.shape(own) != value.shape:
        raise ValueError(f"it has the shape {value.shape}, but {base.shape(own)} in the base.")
    if as_float(value).dtype.kind != "f":
        raise ValueError(f"the trained values are of type {value.dtype}, and the base's are {base.dtype(own)}.")
    if not np.isfinite(as_float(value)).all():
        raise ValueError("the trained values are not finite.")
    _check_values(own, base)
    return own
