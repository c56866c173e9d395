"""Load an adapter from a file: read it, find its layers in the net, put it in and fill it."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype

from mindpet_lite.arguments import did_you_mean, warn_user
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.adapters import Adapter as Source
from mindpet_lite.formats.adapters import read_adapter
from mindpet_lite.formats.base_hash import differing
from mindpet_lite.formats.component import part
from mindpet_lite.formats.peft import unsaved_modules
from mindpet_lite.formats.peft_config import tokens_are_of_table_alone
from mindpet_lite.formats.placed import placed
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.starts import on_residual_base
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.values import in_float32
from mindpet_lite.graph.adapters import adapters_of, deltas_in
from mindpet_lite.graph.base_hash import layer_hash
from mindpet_lite.graph.fill import fill, fill_saved
from mindpet_lite.graph.home import with_path
from mindpet_lite.graph.modules_to_save import Found, find_trained, of_the_base, tied_problems, ties, value_problems
from mindpet_lite.graph.parameters import apply_trains, parameters_with, what_trains
from mindpet_lite.graph.parents import refusal_at
from mindpet_lite.graph.peft_semantics import shared_layers
from mindpet_lite.graph.put_in import followers_of, put_in, start_problems
from mindpet_lite.graph.replicate import replicated
from mindpet_lite.graph.shapes import shape_problems
from mindpet_lite.graph.shared import with_shared
from mindpet_lite.graph.split import is_split, parts_of
from mindpet_lite.graph.tree import cells_by_path, owners_of_parameters, without_inner
from mindpet_lite.names.table import Table, check_table

TRAINABLE = ("adapter", "keep")
_RESIDUAL_CURE = ("Load the residual base first and give residual_base=True; or adapt the net first as it was in "
                  "training, where that gives the same weights again.")


def read_for(net: nn.Cell, path: Path, format: str | None, name_map: Table | None, trainable: str) -> Source:
    """Return the adapter in a file, read for a net; see `load_adapter`."""
    check_table(name_map)
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable must be one of {', '.join(map(repr, TRAINABLE))}, but got {trainable!r:.100}.")
    return read_adapter(path, format, METHODS, list(without_inner(cells_by_path(net))))


def install(net: nn.Cell, source: Source, path: str, name_map: Table | None = None, strict_base: bool = False,
            trainable: str = "adapter", component: str | None = None, residual_base: bool = False) -> nn.Cell:
    """Put an adapter that was read into a net, all of it or nothing; see `load_adapter`.

    Args:
        net: to change.
        source: the adapter.
        path: where it is from, for messages.
        name_map: as `load_adapter` takes it.
        strict_base: likewise.
        trainable: likewise.
        component: likewise.
        residual_base: likewise.
    """
    with replicated(net, source.state.config.get("layer_replication")):
        _install(net, source, path, name_map, strict_base, trainable, component, residual_base)
    return net


def _install(net: nn.Cell, source: Source, path: str, name_map: Table | None, strict_base: bool, trainable: str,
             component: str | None, residual_base: bool) -> None:
    """Put an adapter that was read into a net whose layers are replicated as it says."""
    cells = cells_by_path(net)
    problems: list[str] = []
    state = with_path(part(source.state, component), cells, name_map, problems)
    state = parts_of(under_paths(state, source.kind, cells, name_map, component, problems), cells)
    state, unsettled = on_residual_base(state, _hashes(state, cells), residual_base, _RESIDUAL_CURE)
    problems += unsettled
    values = in_float32(state, path)
    adapted, shared, made = _adapted(values, cells, problems)
    new = {place: delta for place, delta in adapted.items() if delta is not cells[place]}
    problems += [*start_problems(net, new),
                 *tied_problems(net, new, bool(state.config.get("ensure_weight_tying")))]
    trained = find_trained(values, net, problems)
    alone = source.kind == "peft" and tokens_are_of_table_alone(state.config)
    problems += _missing_modules(values, trained, adapted, cells)
    tied = ties(net, state, trained)
    followers = followers_of(new, cells, [*(cells[path] for path in adapted), *(cell for _, cell in tied.values())],
                             [] if alone else problems)
    if not problems:
        problems += _other_base(state, cells, path, strict_base)
    if source.kind == "peft":
        problems += unsaved_modules(state, [
            name.rpartition(".")[0] for _, owners in owners_of_parameters(net) for name, _ in owners])
    if problems:
        raise ValueError(f"The adapter in {path} does not fit the net, which is unchanged:\n  {listed(problems)}")
    for text in [*source.remarks, *(shared_layers(state.config, cells, adapted) if source.kind == "peft" else ())]:
        warn_user(f"{path}: {text}")
    if followers and alone:
        warn_user(f"{path}: the tokens that train are rows of a table that another layer has too (tied weights). That "
                  f"layer stays as it is: by the config (auto_mapping) the adapter is of no model of transformers. "
                  f"Where the model was a PreTrainedModel of your own, whose output layer PEFT changes too, set "
                  f"auto_mapping to null in the config.")
        followers = {}
    unchanged = of_the_base(state)
    saved = [item for name, (place, item) in trained.items() if name not in unchanged and place not in tied]
    parameters = parameters_with(net, new)
    if trainable == "adapter":
        apply_trains(net, parameters, what_trains(parameters, cells, adapted.values(), saved))
    record, untied = put_in(net, cells, adapted, followers, saved, tied, shared)
    for parameter in untied.values():
        parameter.requires_grad = trainable == "adapter" or parameter.requires_grad
    of_base = {id(item.parameter): item for item in record.saved}
    for place, delta in adapted.items():
        fill(delta, values.layers[place], state.layers[place], of_base)
    for name, item in shared.items():
        if item is not made[name]:
            put(item, Tensor(made[name].asnumpy()))
    found = {name: (place, untied.get(place, item)) for name, (place, item) in trained.items()}
    fill_saved(record, values, state, found, unchanged)
    if not adapted or any(delta.adapter is record for delta in adapted.values()):
        # Else what it trains belongs to another adapter of the net now, which has a config of its own.
        record.config, record.carried, record.component = state.config, state.carried, state.component
    record.replication = [list(part) for part in state.config.get("layer_replication") or ()]


def under_paths(state: AdapterState, kind: str, cells: Mapping[str, nn.Cell], name_map: Table | None,
                 component: str | None, problems: list[str]) -> AdapterState:
    """Return the adapter under the net's paths; add to `problems` what has no place."""
    if kind == "mindpet":
        state = _by_parameter_name(state, cells)
    try:
        return placed(state, without_inner(cells), name_map, component)
    except ValueError as error:
        problems += [line if line.startswith("the ") else f"unexpected: {line}"
                     for line in map(str.strip, str(error).splitlines())]
        # What is found is checked all the same, for one message.
        return dataclasses.replace(state, trained={}, layers={path: layer for path, layer in state.layers.items()
                                                              if path in cells})


def _by_parameter_name(state: AdapterState, cells: Mapping[str, nn.Cell]) -> AdapterState:
    """Return the adapter with paths: MindPet names layers by `Parameter.name`, which may not be the path; we do not."""
    path_of = {parameter.name.removesuffix(name).removesuffix("."): place
               for place, delta in deltas_in(cells).items() for name, parameter in delta.delta_parameters().items()}
    return dataclasses.replace(state, layers={name if layer.settings is not None else path_of.get(name, name): layer
                                              for name, layer in state.layers.items()})


def _other_base(state: AdapterState, cells: Mapping[str, nn.Cell], path: str, strict: bool) -> list[str]:
    """Warn of an adapter that was trained on another base, or return that as a problem."""
    other = differing(state.config, _hashes(state, cells))
    if not other:
        return []
    text = (f"{path} was trained on another base than this net: the weights of {', '.join(other[:3])}"
            f"{f' and {len(other) - 3} more layers' if len(other) > 3 else ''} are not those it belongs to.")
    if strict:
        return [text]
    warn_user(text)
    return []


def _hashes(state: AdapterState, cells: Mapping[str, nn.Cell]) -> dict[str, Callable[[], str]]:
    """Return what gives the hash of each of an adapter's layers that the net has."""
    found = deltas_in(cells)
    return {place: functools.partial(layer_hash, cells[place], found.get(place))
            for place in state.layers if place in cells and not is_split(cells[place])}


def _adapted(state: AdapterState, cells: Mapping[str, nn.Cell], problems: list[str]
             ) -> tuple[dict[str, Delta], dict[str, Parameter], dict[str, Parameter]]:
    """Return the delta that each layer of the file goes to, new where the net's is plain, and what they share.

    Adds every problem found.

    Returns:
        The deltas by path; by name the Parameters that they share, and those that hold the values of the file.
    """
    unknown = [name for name in [*state.method.split("+"), *filter(None, (layer.method for layer in
                                                                          state.layers.values()))]
               if name not in METHODS]
    if unknown:
        problems.append(f"the file is of method {unknown[0]!r}, which is none of {', '.join(METHODS)}.")
        return {}, {}, {}
    place_of: dict[int, str] = {}
    present = deltas_in(cells)
    configs: dict[str, DeltaConfig] = {}
    for path, layer in state.layers.items():
        if path not in cells:
            problems.append(f"unexpected: the net has no layer {path!r}.{did_you_mean(path, cells)}")
            continue
        if id(cells[path]) in place_of:
            problems.append(f"unexpected: {path} and {place_of[id(cells[path])]} are one layer in the net, two in the "
                            f"file.")
        place_of[id(cells[path])] = path
        try:
            kind = METHODS[layer.method or state.method]
            config = _config_for(kind, path, cells, present.get(path), layer, problems)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
            continue
        if config is not None:
            configs[path] = config
    adapted, shared, made = with_shared(configs, state, cells, present, problems)
    for path, delta in adapted.items():
        problems.extend(mismatches(path, delta, state.layers[path]))
    methods = {layer.method or state.method for layer in state.layers.values()}
    problems.extend(f"missing: the net's adapted layer {path} is not in the file." for path, delta in present.items()
                    if delta.method in methods and id(cells[path]) not in place_of)
    return adapted, shared, made


def _config_for(kind: type[DeltaConfig], path: str, cells: Mapping[str, nn.Cell], present: Delta | None,
                layer: LayerState, problems: list[str]) -> DeltaConfig | None:
    """Return the settings that a file has for a layer.

    None, and a problem, where the file's tensors have not the shapes that its settings say.
    """
    if present is not None:
        if present.method != kind.pet_type:
            raise ValueError(f"the file is of method {kind.pet_type!r}, the layer in the net is of "
                             f"{present.method!r:.100}.")
        own = getattr(present, "config", None)
        return own if layer.settings is None and isinstance(own, kind) else kind.of_layer(layer.settings or {})
    if layer.settings is None:
        raise ValueError("the layer is plain and the file does not say rank and alpha or whatever its method needs: "
                         "adapt the net first, with the values it was trained with.")
    config = kind.of_layer(layer.settings, **_factor_type(kind, cells[path], layer))
    # Before any memory is taken for what the settings say.
    wrong = shape_problems(path, layer, {} if refusal_at(config, path, cells) else config.shapes(cells[path]))
    problems += wrong
    return None if wrong else config


def _factor_type(kind: type[DeltaConfig], cell: nn.Cell, layer: LayerState) -> dict[str, mstype.Type]:
    """Return the type of new factors: float32, in which they can train, but for a float16 file on a float16 layer."""
    half = "param_init_type" in {field.name for field in dataclasses.fields(kind)} and all(
        value.dtype == np.float16 for value in layer.tensors.values()) and all(
        item.dtype == mstype.float16 for _, item in cell.parameters_and_names(expand=False))
    return {"param_init_type": mstype.float16} if half else {}


def mismatches(path: str, delta: Delta, layer: LayerState) -> list[str]:
    """Return, a sentence each, how a layer of a file differs from the delta that it goes to."""
    own = delta.delta_parameters()
    problems = [] if layer.settings is None else [f"{path}: {text}" for text in delta.unlike(layer.settings)]
    problems += shape_problems(path, layer, {name: item.shape for name, item in own.items()})
    # MindPet's checkpoints hold constants as well.
    problems += [f"unexpected: {path}.{name}." for name in layer.tensors
                 if name not in own and name not in delta.setting_parameters()]
    for name, value in layer.tensors.items():
        if name in own:
            problems += value_problems(f"{path}.{name}", own[name], value)
    return problems


def _missing_modules(state: AdapterState, found: Found, adapted: Mapping[str, Delta], cells: Mapping[str, nn.Cell]
                     ) -> list[str]:
    """Return which base Parameters trained with the net's adapter and are not in the file, which would keep them."""
    present = [delta for place, delta in adapted.items() if delta is cells[place]]
    in_file = {id(item) for _, item in found.values()}
    return [f"missing: {item.path or item.parameter.name}, which trained with the net's adapter, is not in the file: "
            f"load it into a net without that adapter." for record in adapters_of(present) for item in record.saved
            if item.other is not None and not item.is_untrained() and id(item.parameter) not in in_file]
