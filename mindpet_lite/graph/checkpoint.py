"""Adapter files: only the deltas, with what is needed to use them."""
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta, did_you_mean
from mindpet_lite.formats import mindpet, peft
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.graph.freeze import net_parameters
from mindpet_lite.graph.inject import adapt, settle_names
from mindpet_lite.graph.live import deltas
from mindpet_lite.graph.tree import cells_by_path, replace, require_cell


def adapter_state(net: nn.Cell) -> AdapterState:
    """Return the deltas of `net` as numpy arrays, by layer path.

    Raises:
        ValueError: the net has no adapted layer, or layers of several methods.
    """
    found = deltas(net)
    methods = sorted({cell.method for cell in found.values()})
    if len(methods) > 1:
        raise ValueError(f"One adapter file holds one method, but the net has {' and '.join(methods)}.")
    return AdapterState(methods[0], {path: LayerState(
        {name: _to_numpy(parameter) for name, parameter in cell.delta_parameters().items()}, cell.settings())
        for path, cell in found.items()})


def save_adapter(net: nn.Cell, directory: str | os.PathLike[str]) -> Path:
    """Write the deltas of `net` as a PEFT adapter directory; the base is not in it.

    ``adapter_config.json`` and ``adapter_model.safetensors`` with keys ``base_model.model.<path>.lora_A.weight`` are
    written whole or not at all. The strength of :func:`mindpet_lite.set_lora_scale` is a state of the running net and
    is not written.

    Args:
        net: a net with adapted layers.
        directory: made if missing; files of an earlier save are replaced.

    Returns:
        The directory.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no adapted layer, or the net itself is one (a layer needs a path).
        OSError: the directory cannot be written, or the disk is full; what was there is unchanged.
    """
    state = adapter_state(require_cell(net))
    if "" in state.layers:
        raise ValueError("The net itself is the adapted layer, so it has no path to be saved under: put it in a cell.")
    peft.save(state, Path(directory))
    return Path(directory)


def load_adapter(net: nn.Cell, directory: str | os.PathLike[str]) -> nn.Cell:
    """Load an adapter into `net`, all of it or nothing, in place.

    Layers that the file names and that are still plain are adapted first, with the file's rank and alpha. Where the
    net has another alpha than the file, the file's is taken. Parameters that were trainable or frozen stay so.

    Args:
        net: the base, adapted or not.
        directory: as `save_adapter` or PEFT wrote it; or a ``.ckpt`` file, as `TrainableParamsCheckPoint` or MindPet
            wrote it. MindPet's names are read in both spellings (``mindpet_delta_lora_a`` and ``..._A``); its files
            hold no rank and alpha, so they fit a net that is adapted already.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell.
        FileNotFoundError: the directory or a file in it is missing.
        ValueError: a file is damaged, or does not fit the net: missing, unexpected and misshapen keys stand in one
            message. The net is unchanged.
    """
    cells = cells_by_path(net)
    path = Path(directory)
    state = _read_checkpoint(path, cells) if path.suffix == ".ckpt" else peft.load(path)
    homes, problems = _homes(state, cells)
    if problems:
        raise ValueError(f"The adapter in {directory} does not fit the net, which is unchanged:\n  "
                         + "\n  ".join(problems))
    swaps = {cells[place]: cell for place, cell in homes.items() if cell is not cells[place]}
    settle_names(net_parameters(net), {place: cell for place, cell in homes.items() if cells[place] in swaps})
    for place, cell in homes.items():
        _fill(cell, state.layers[place])
    if swaps:
        replace(net, swaps)
    return net


def _homes(state: AdapterState, cells: Mapping[str, nn.Cell]) -> tuple[dict[str, Delta], list[str]]:
    """Return the adapted cell that each layer of the file goes to, new where still plain, and every problem found."""
    problems: list[str] = []
    homes: dict[str, Delta] = {}
    place_of: dict[int, str] = {}
    for path, layer in state.layers.items():
        if path not in cells:
            problems.append(f"unexpected: the net has no layer {path!r}.{did_you_mean(path, cells)}")
            continue
        cell = cells[path]
        if id(cell) in place_of:
            problems.append(f"unexpected: {path} and {place_of[id(cell)]} are one layer in the net, two in the file.")
        place_of[id(cell)] = path
        try:
            config = METHODS[state.method](**layer.settings)
            if not isinstance(cell, Delta):
                if not layer.settings:
                    raise ValueError("the layer is plain and the file does not say rank and alpha: adapt the net "
                                     "first, with the values it was trained with.")
                cell = adapt(config, cell)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
            continue
        homes[path] = cell
        problems.extend(_mismatches(path, cell, layer))
    problems.extend(f"missing: the net's adapted layer {path} is not in the file." for path, cell in cells.items()
                    if isinstance(cell, Delta) and id(cell) not in place_of)
    return homes, problems


def _mismatches(path: str, cell: Delta, layer: LayerState) -> list[str]:
    own = cell.delta_parameters()
    problems = [f"missing: {path}.{name}." for name in own if name not in layer.tensors]
    problems += [f"unexpected: {path}.{name}." for name in layer.tensors if name not in own]
    problems += [f"misshapen: {path}.{name} is {tuple(own[name].shape)} in the net, {value.shape} in the file."
                 for name, value in layer.tensors.items() if name in own and tuple(own[name].shape) != value.shape]
    problems += [f"not finite: {path}.{name} holds NaN or infinite values." for name, value in layer.tensors.items()
                 if not np.isfinite(value).all()]
    return problems


def _fill(cell: Delta, layer: LayerState) -> None:
    for name, parameter in cell.delta_parameters().items():
        parameter.set_data(Tensor(layer.tensors[name]).astype(parameter.dtype))
    if layer.settings:
        cell.adopt_settings(layer.settings)


def _read_checkpoint(path: Path, cells: Mapping[str, nn.Cell]) -> AdapterState:
    """Read a MindSpore checkpoint of deltas; MindPet's name layers by `Parameter.name`, which may not be the path."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: check the path.")
    try:
        entries = mindspore.load_checkpoint(str(path))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is not a whole MindSpore checkpoint: it was cut short or damaged; copy or save it "
                         f"again.") from error
    settings = entries.pop(mindpet.SETTINGS_KEY, None)
    try:
        state = mindpet.decode({name: _to_numpy(value) for name, value in entries.items()}, settings)
    except ValueError as error:
        raise ValueError(f"The adapter in {path} cannot be used:\n  {error}") from error
    if settings is not None:
        return state
    path_of = {parameter.name.rpartition(".")[0]: place for place, cell in reversed(list(cells.items()))
               for parameter in (cell.delta_parameters().values() if isinstance(cell, Delta) else ())}
    return AdapterState(state.method, {path_of.get(name, name): layer for name, layer in state.layers.items()})


def _to_numpy(parameter: Parameter) -> np.ndarray:
    """Return the value as numpy; bfloat16, which numpy lacks, as float32 (the same numbers)."""
    if parameter.dtype == mstype.bfloat16:
        return parameter.astype(mstype.float32).asnumpy()
    return parameter.asnumpy().copy()
