"""Adapter files: only the deltas, with what is needed to use them."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype

from mindpet_lite.arguments import did_you_mean, warn_user
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta, DeltaConfig
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.names import Table, check_table, map_names, renamed
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.values import in_float32
from mindpet_lite.graph.beside import (
    STATISTICS,
    Places,
    beside_of,
    bring_along,
    of_the_base,
    places_of_trained,
    ties,
    untie,
    value_problems,
)
from mindpet_lite.graph.fingerprint import FIELD, differing, fingerprint
from mindpet_lite.graph.foreign import remarks, tied_tokens
from mindpet_lite.graph.freeze import apply_trains, net_parameters
from mindpet_lite.graph.inject import adapt, set_base_values, settle_names
from mindpet_lite.graph.live import deltas, deltas_in
from mindpet_lite.graph.tree import cells_by_path, replace, require_cell, without_inner

# Sizes up to this one need not show in the tensors: a folded prefix has lost some of its own.
_ANY_SIZE = 4096


def adapter_state(net: nn.Cell) -> AdapterState:
    """Return the deltas of `net` as numpy arrays, by layer path.

    Raises:
        ValueError: the net has no adapted layer, or layers of several methods.
    """
    found = deltas(net)
    methods = sorted({cell.method for cell in found.values()})
    if len(methods) > 1:
        raise ValueError(f"One adapter file holds one method, but the net has {' and '.join(methods)}.")
    layers = {path: LayerState({name: _to_numpy(parameter) for name, parameter in cell.delta_parameters().items()},
                               cell.settings()) for path, cell in found.items()}
    return AdapterState(methods[0], layers, _trained_beside(net, found),
                        dict(next((cell.origin for cell in found.values() if cell.origin), {})),
                        dict(next((cell.carried for cell in found.values() if cell.carried), {})))


def _trained_beside(net: nn.Cell, deltas_of_net: Mapping[str, Delta]) -> dict[str, np.ndarray]:
    """Return the base Parameters that train beside the deltas or belong to their adapter.

    Where nothing was frozen, those that train say nothing.
    """
    own = {id(item) for delta in deltas_of_net.values() for item in delta.delta_parameters().values()}
    base = [(parameter, names) for parameter, names in net_parameters(net) if id(parameter) not in own]
    beside = beside_of(deltas_of_net.values())
    frozen = any(not parameter.requires_grad for parameter, names in base if not names[0].endswith(STATISTICS))
    found = {}
    for parameter, names in base:
        item = beside.get(id(parameter))
        if item is not None:
            found[item.path if item.path in names else names[0]] = _to_numpy(item.trained())
        elif frozen and parameter.requires_grad:
            found[names[0]] = _to_numpy(parameter)
    return found


def save_adapter(net: nn.Cell, path: str | os.PathLike[str], format: str = "peft") -> Path:
    """Write the deltas of `net` as an adapter, and what trains beside them; the frozen base is not in it.

    What is written is written whole or not at all. The strength of :func:`mindpet_lite.set_lora_scale` is a state of
    the running net and is not written. An adapter that is new says in its config which base it belongs to, by a hash
    of each adapted layer's weight; one that came from elsewhere keeps its config as it was.

    Args:
        net: a net with adapted layers.
        path: a directory (made if missing; files of an earlier save are replaced) or, for formats of one file, its
            name.
        format: "peft": a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, LoRA with PEFT's
            keys ``base_model.model.<path>.lora_A.weight``, other methods under ``<path>.<our parameter name>``;
            "diffusers" or "kohya": a ``.safetensors`` file for a U-Net or text encoder; "mindpet": a ``.ckpt`` or
            ``.safetensors`` file; "mindformers": a directory.

    Returns:
        The path.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no adapted layer, layers of several methods, or is itself one (a layer needs a path);
            the format is unknown, or cannot hold this adapter: the message says which field of which layer.
        OSError: the place cannot be written, or the disk is full; what was there is unchanged.
    """
    state = adapter_state(require_cell(net))
    if "" in state.layers:
        raise ValueError("The net itself is the adapted layer, so it has no path to be saved under: put it in a cell.")
    if not state.config:
        cells = cells_by_path(net)
        state.config[FIELD] = {path: found for path in state.layers if (found := fingerprint(cells[path]))}
    write_files(to_files(state, format, Path(path)))
    return Path(path)


def load_adapter(net: nn.Cell, path: str | os.PathLike[str], format: str | None = None,
                 name_map: Table | None = None, strict_base: bool = False) -> nn.Cell:
    """Load an adapter into `net`, all of it or nothing, in place.

    Layers that the file names and that are still plain are adapted first, with the file's settings. Where the net has
    another alpha than the file, the file's is taken. Parameters that were trainable or frozen stay so; only a BitFit
    file, whose parameters are the net's own, makes them train and freezes the rest.

    The layers of a file are those of the net with the same path; else the one whose path ends so; else the layer that
    another library calls so (Hugging Face's Llama and BERT, diffusers' U-Net, Stable Diffusion's own names).

    Args:
        net: the base, adapted or not.
        path: a directory or file, as `save_adapter`, PEFT, diffusers, kohya's scripts, MindPet or MindFormers wrote
            it. MindPet's checkpoints hold no rank and alpha, so they fit a net that is adapted already.
        format: "peft", "diffusers", "kohya", "mindpet" or "mindformers"; told by keys and files without it.
        name_map: for layers that are called otherwise: ``{path in the file: path in the net}``, or pairs of a regular
            expression and what to put in its place.
        strict_base: refuse an adapter that was trained on another base, instead of a warning.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell.
        FileNotFoundError: the directory or a file in it is missing.
        ValueError: a file is damaged, or does not fit the net: missing, unexpected and misshapen keys stand in one
            message. The net is unchanged.
    """
    cells = cells_by_path(net)
    check_table(name_map)
    source = read_adapter(Path(path), format, METHODS, list(without_inner(cells)))
    state, homes, beside, problems = _placed(in_float32(source.state, str(path)), source.kind, net, cells, name_map)
    expected = state.config.get(FIELD)
    other = differing(expected, cells) if isinstance(expected, Mapping) and not problems else []
    if other:
        text = (f"{path} was trained on another base than this net: the weights of {', '.join(other[:3])}"
                f"{f' and {len(other) - 3} more layers' if len(other) > 3 else ''} are not those it belongs to.")
        if strict_base:
            problems.append(text)
        else:
            warn_user(text)
    problems += tied_tokens(net, state) if source.kind == "peft" else []
    if problems:
        raise ValueError(f"The adapter in {path} does not fit the net, which is unchanged:\n  "
                         + "\n  ".join(problems))
    if source.kind == "peft":
        for text in remarks(state.config, cells, homes):
            warn_user(f"{path}: {text}")
    swaps = {cells[place]: delta for place, delta in homes.items()
             if isinstance(delta, nn.Cell) and delta is not cells[place]}
    parameters = net_parameters(net)
    settle_names(parameters, {place: delta for place, delta in homes.items() if cells[place] in swaps})
    for place, delta in homes.items():
        if cells[place] in swaps:
            set_base_values(delta)
        _fill(delta, state.layers[place])
        delta.origin, delta.carried = state.config, state.carried
    own = untie(net, ties(net, state, beside))
    bring_along(homes.values(), deltas_in(cells).values(), state.trained,
                {name: (place, own.get(place, parameter)) for name, (place, parameter) in beside.items()},
                of_the_base(state))
    thawed = {id(item) for delta in homes.values() if not isinstance(delta, nn.Cell)
              for item in delta.delta_parameters().values()}
    if thawed:
        apply_trains(net, parameters, [id(item) in thawed for item, _ in parameters])
    if swaps:
        replace(net, swaps)
    return net


def _placed(state: AdapterState, kind: str, net: nn.Cell, cells: Mapping[str, nn.Cell], name_map: Table | None
            ) -> tuple[AdapterState, dict[str, Delta], Places, list[str]]:
    """Return the adapter under the net's paths, the home of each layer and base parameter, and every problem found."""
    if kind == "mindpet":
        state = _by_parameter_name(state, cells)
    paths = [path for path in without_inner(cells) if path]
    problems: list[str] = []
    # Nothing to ask where every layer has its own path and holds no other.
    leaves = set(paths).difference(path.rpartition(".")[0] for path in paths) | {""}
    if name_map is not None or not set(state.layers) <= leaves:
        try:
            table = map_names(state.layers, paths, name_map)
            expected = state.config.get(FIELD)
            state = renamed(state, paths, name_map)
            if isinstance(expected, Mapping):
                state.config[FIELD] = {table.get(path, path): found for path, found in expected.items()}
        except ValueError as error:
            problems += [f"unexpected: {line.strip()}" for line in str(error).splitlines()]
            # What is found is checked all the same, for one message.
            state = dataclasses.replace(state, layers={path: layer for path, layer in state.layers.items()
                                                       if path in cells}, trained={})
    homes, more = _homes(state, cells)
    return state, homes, places_of_trained(state, net, problems), problems + more


def _homes(state: AdapterState, cells: Mapping[str, nn.Cell]) -> tuple[dict[str, Delta], list[str]]:
    """Return the adapted cell that each layer of the file goes to, new where still plain, and every problem found."""
    problems: list[str] = []
    if state.method not in METHODS:
        return {}, [f"the file is of method {state.method!r}, which is none of {', '.join(METHODS)}."]
    homes: dict[str, Delta] = {}
    place_of: dict[int, str] = {}
    present = deltas_in(cells)
    for path, layer in state.layers.items():
        if path not in cells:
            problems.append(f"unexpected: the net has no layer {path!r}.{did_you_mean(path, cells)}")
            continue
        cell = cells[path]
        if id(cell) in place_of:
            problems.append(f"unexpected: {path} and {place_of[id(cell)]} are one layer in the net, two in the file.")
        place_of[id(cell)] = path
        try:
            homes[path] = _home(METHODS[state.method], state.method, cell, layer)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
            continue
        problems.extend(_mismatches(path, homes[path], layer))
    problems.extend(f"missing: the net's adapted layer {path} is not in the file." for path in present
                    if id(cells[path]) not in place_of)
    return homes, problems



def _home(kind: type[DeltaConfig], method: str, cell: nn.Cell, layer: LayerState) -> Delta:
    """Return the delta of `cell` that takes the layer of a file: its own, or a new one where the cell is plain."""
    if isinstance(cell, Delta):
        if cell.method != method:
            raise ValueError(f"the file is of method {method!r}, the layer in the net is of {cell.method!r}.")
        kind(**(layer.settings or {}))
        return cell
    if layer.settings is None:
        raise ValueError("the layer is plain and the file does not say rank and alpha or whatever its method needs: "
                         "adapt the net first, with the values it was trained with.")
    _refuse_larger_than_file(kind, layer)
    half = "param_init_type" in {field.name for field in dataclasses.fields(kind)} and all(
        value.dtype == np.float16 for value in layer.tensors.values())
    return adapt(kind(**layer.settings, **({"param_init_type": mstype.float16} if half else {})), cell)


def _refuse_larger_than_file(kind: type[DeltaConfig], layer: LayerState) -> None:
    """Raise ValueError if a size in the settings is beyond what the file holds: no memory is taken for it."""
    held = sum(value.size for value in layer.tensors.values())
    sizes = {field.name: (layer.settings or {}).get(field.name) for field in dataclasses.fields(kind)
             if "int" in str(field.type).split(" | ")}
    large = [f"{name} = {size}" for name, size in sizes.items()
             if isinstance(size, int) and size > max(held, _ANY_SIZE)]
    if large:
        raise ValueError(f"{' and '.join(large)} cannot be: the file holds {held} values for the layer.")


def _mismatches(path: str, delta: Delta, layer: LayerState) -> list[str]:
    own = delta.delta_parameters()
    problems = [f"{path}: {text}" for text in delta.unlike(layer.settings or {})]
    problems += [f"missing: {path}.{name}." for name in own if name not in layer.tensors]
    # MindPet's checkpoints hold constants as well.
    problems += [f"unexpected: {path}.{name}." for name in layer.tensors
                 if name not in own and name not in delta.live_parameters()]
    problems += [f"misshapen: {path}.{name} is {tuple(own[name].shape)} in the net, {value.shape} in the file."
                 for name, value in layer.tensors.items() if name in own and tuple(own[name].shape) != value.shape]
    for name, value in layer.tensors.items():
        if name in own:
            problems += value_problems(f"{path}.{name}", own[name], value)
    return problems



def _fill(delta: Delta, layer: LayerState) -> None:
    for name, parameter in delta.delta_parameters().items():
        put(parameter, Tensor(layer.tensors[name]).astype(parameter.dtype))
    if layer.settings is not None:
        delta.adopt_settings(layer.settings)


def _by_parameter_name(state: AdapterState, cells: Mapping[str, nn.Cell]) -> AdapterState:
    """Return the adapter with paths: MindPet names layers by `Parameter.name`, which may not be the path."""
    path_of = {parameter.name.removesuffix(name).removesuffix("."): place
               for place, delta in deltas_in(cells).items() for name, parameter in delta.delta_parameters().items()}
    return AdapterState(state.method, {name if name in cells else path_of.get(name, name): layer
                                       for name, layer in state.layers.items()}, state.trained, state.config)


def _to_numpy(parameter: Tensor) -> np.ndarray:
    """Return the value as numpy; bfloat16, which numpy lacks, as float32 (the same numbers)."""
    if parameter.dtype == mstype.bfloat16:
        return parameter.astype(mstype.float32).asnumpy()
    return parameter.asnumpy().copy()
