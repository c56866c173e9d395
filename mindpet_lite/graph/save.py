"""Write the adapter of a net to a file: only the deltas, with what is needed to use them."""
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, nn
from mindspore.communication import get_rank

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.values import to_numpy
from mindpet_lite.formats.adapters import to_files, write_files
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.component import part
from mindpet_lite.formats.problems import first_of
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.values import in_type
from mindpet_lite.graph.adapters import adapters_of, deltas, saved_of
from mindpet_lite.graph.base_hash import layer_hash
from mindpet_lite.graph.named import banks_of, check_names, named, state_of
from mindpet_lite.graph.parameters import STATISTICS, net_parameters
from mindpet_lite.graph.split import is_split, wait_for_all, whole
from mindpet_lite.graph.tree import cells_by_path, owners_of_parameters, require_cell


def save_adapter(net: nn.Cell, path: str | os.PathLike[str], format: str = "peft",
                 component: str | None = None, name: str | None = None) -> Path:
    """Write the deltas of `net` as an adapter, and what trains with them; the frozen base is not in it.

    What is written is written whole or not at all. The strength of `mindpet_lite.set_lora_scale` is a state of
    the running net and is not written. An adapter that is new says in its config which base it belongs to, by a hash
    of each adapted layer's weight; one that came from elsewhere keeps its config as it was, and values that did not
    change keep the type that its file had them in.

    Args:
        net: a net with adapted layers.
        path: a directory (made if missing; files of an earlier save are replaced) or, for formats of one file, its
            name.
        format: "peft": a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, LoRA with PEFT's
            keys ``base_model.model.<path>.lora_A.weight``, other methods, and several on one net, under
            ``<path>.<our parameter name>``; "diffusers" or "kohya": a ``.safetensors`` file for a U-Net or text
            encoder or transformer; "mindpet": a ``.ckpt`` or ``.safetensors`` file; "mindformers": a directory.
            Default: "peft".
        component: of a diffusion pipeline that the net is, for "diffusers" and "kohya", which say it in each key:
            "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "transformer_2" or "vae". Without
            it, the net is what the file said that it was loaded from; else the U-Net, unless the names of its layers
            are those of something else. Of a net whose paths say the component, the part to save, in any format.
            Default: None.
        name: of the adapter, on a net with several. Default: None.

    Returns:
        The path.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: `path` is empty; the net has no adapted layer, or is itself one (a layer needs a path); the format
            is unknown, or cannot hold this adapter: the message says which field of which layer.
        OSError: the place cannot be written, or the disk is full; what was there is unchanged.

    Examples:
        >>> import os
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> path = mp.save_adapter(net, "adapter")
        >>> sorted(os.listdir(path))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if not os.fspath(path):
        raise ValueError("path must name a directory or a file to write, but got an empty string.")
    state = state_to_save(net, name)
    try:
        files = to_files(part(state, component, format), format, Path(path), METHODS)
    except ValueError as error:
        raise ValueError(f"The adapter was not written to {path}:\n  {first_of(error)}") from error
    is_shared = any(is_split(cell) for cell in cells_by_path(net).values())
    if not is_shared or get_rank() == 0:
        write_files(files)
    if is_shared:
        wait_for_all()
    return Path(path)


def state_to_save(net: nn.Cell, name: str | None) -> AdapterState:
    """Return the net's adapter, or the one of this name, with the config that its files have.

    Where layers are split over processes, every process must call it.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no such adapter, several and no name is given, or is itself the adapted layer.
    """
    cells = cells_by_path(require_cell(net))
    state = whole(_state(net, name), cells)
    if "" in state.layers:
        raise ValueError("The net itself is the adapted layer, so it has no path to be saved under: put it in a cell.")
    if not state.config:
        found = deltas(net)
        # Of a weight out of which the start took a part, the base's own is not known here. Where it could not be taken
        # again, what was left is the base.
        state.config[FIELD] = {place: value for place in state.layers
                               if not is_split(cells[place])
                               and (found[place].base_is_lost or not found[place].base_values())
                               and (value := layer_hash(cells[place], found[place]))}
        state.config.update(_told(net, name))
    replication = next((record.replication for record in adapters_of(deltas(net).values()) if record.replication), None)
    if replication:
        state.config["layer_replication"] = replication
    return state


def _told(net: nn.Cell, name: str | None) -> dict[str, str]:
    """Return what the user said of the adapter for other tools."""
    known = named(net).records
    records = [known[name]] if name in known else adapters_of(deltas(net).values())
    return {field: value for record in records for field, value in record.told.items()}


def _state(net: nn.Cell, name: str | None) -> AdapterState:
    """Return the net's adapter, or the one of this name.

    Raises:
        ValueError: the net has no such adapter, or several and no name is given.
    """
    known = named(net)
    if name is None and len(known.names) > 1:
        raise ValueError(f"the net has several adapters ({', '.join(known.names)}): say which by name.")
    if name is not None:
        check_names([name], known)
    if name in known.turns:
        return known.turns[str(name)]
    return state_of(net, name or known.names[0]) if banks_of(net) and known.names else adapter_state(net)


def adapter_state(net: nn.Cell) -> AdapterState:
    """Return the deltas of `net` as numpy arrays, by layer path.

    Raises:
        ValueError: the net has no adapted layer.
    """
    found = deltas(net)
    methods, saved = sorted({delta.method for delta in found.values()}), saved_of(found.values())

    def trained(parameter: Parameter) -> np.ndarray:
        # Of an adapter that is switched off the base's value may be in place.
        return to_numpy(saved[id(parameter)].trained() if id(parameter) in saved else parameter)

    layers = {path: LayerState({name: _as_in_file(trained(parameter), delta.file_types.get(name))
                                for name, parameter in delta.delta_parameters().items()},
                               delta.settings(), delta.method) for path, delta in found.items()}
    records = adapters_of(found.values())
    config = next((record.config for record in records if record.config), {})
    carried = next((record.carried for record in records if record.carried), {})
    component = next((record.component for record in records if record.component), "")
    shared = {name: to_numpy(item) for record in records for name, item in record.shared.items()}
    return AdapterState("+".join(methods), layers, _trained(net, found), dict(config), dict(carried), component, shared)


def _trained(net: nn.Cell, found: Mapping[str, Delta]) -> dict[str, np.ndarray]:
    """Return the base Parameters that belong to the net's adapters, or train with them.

    Where nothing was frozen, those that train say nothing. Tied weights stand under the path of each of their layers:
    one alone would be read as the weight of that layer, no longer tied.
    """
    own = {id(item) for delta in found.values() for item in delta.delta_parameters().values()}
    base = [(parameter, names) for parameter, names in net_parameters(net) if id(parameter) not in own]
    saved, owners = saved_of(found.values()), {id(item): places for item, places in owners_of_parameters(net)}
    frozen = any(not parameter.requires_grad for parameter, names in base if not names[0].endswith(STATISTICS))
    trained = {}
    for parameter, _ in base:
        places, item = _paths(owners[id(parameter)]), saved.get(id(parameter))
        if item is not None:
            value = _as_in_file(to_numpy(item.trained()), item.file_type)
            of_file = {id(cell): path for path, cell in owners[id(parameter)] if path == item.path}
            places = of_file if of_file and item.other is None else {**places, **of_file}
            trained.update(dict.fromkeys(places.values(), value))
        elif frozen and parameter.requires_grad:
            trained.update(dict.fromkeys(places.values(), to_numpy(parameter)))
    return trained


def _paths(owners: list[tuple[str, nn.Cell]]) -> dict[int, str]:
    """Return the first path of a Parameter in each of the cells that hold it."""
    return {id(cell): path for path, cell in reversed(owners)}


def _as_in_file(value: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Return the value in the type that a file had it in, where that changes no number."""
    return value if dtype is None else in_type(value, dtype)
