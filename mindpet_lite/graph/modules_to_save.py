"""Base parameters that an adapter saves whole, such as those of a new head: where the net has them."""
from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from mindspore import Parameter, mint, nn
from mindspore import dtype as mstype

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.delta.base import FLOATS, Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.graph.parameters import STATISTICS, net_parameters
from mindpet_lite.graph.saved_parameter import copy_of
from mindpet_lite.graph.tree import drop_compiled_graphs, owners_of_parameters, set_parameter
from mindpet_lite.names.parameter_names import pytorch_name

# By its name in a file the path of a Parameter in the net, and itself.
Found = Mapping[str, tuple[str, Parameter]]
# By the path of a Parameter that other cells use too, itself and the cell that is to have its own.
Ties = Mapping[str, tuple[Parameter, nn.Cell]]


def saved_by(config: DeltaConfig, net: nn.Cell, cells: Mapping[str, nn.Cell], chosen: Mapping[str, nn.Cell],
             problems: list[str]) -> tuple[list[Parameter], Ties]:
    """Return the base Parameters that a config saves whole; add to `problems` what cannot be.

    Tied weights of which modules_to_save name one place alone are returned apart: they need Parameters of their own.

    Args:
        config: its `modules_to_save` name modules, its `trains_base` single Parameters.
        net: to adapt.
        cells: of the net, by path.
        chosen: the layers to adapt, by path.
        problems: a sentence each.
    """
    adapted = {id(cell) for cell in chosen.values()}
    found = {id(item): item for cell in cells.values() for name, item in cell.parameters_and_names(expand=False)
             if config.trains_base(name, id(cell) in adapted)}
    whole: list[str] = []
    for entry in config.modules_to_save or ():
        hits = [path for path in cells if path == entry or path.endswith("." + entry)]
        inner = [path for path, cell in cells.items() if (id(cell) in adapted or isinstance(cell, Delta))
                 and any(path == hit or path.startswith(hit + ".") for hit in hits)]
        if inner:
            problems.append(f"modules_to_save entry {entry!r:.100} holds the adapted layer {inner[0]}: take it out of "
                            f"one.")
        elif not any(True for path in hits for _ in cells[path].get_parameters()):
            problems.append(f"modules_to_save entry {entry!r:.100} hits no module with parameters."
                            f"{did_you_mean(entry, (path.rpartition('.')[2] for path in cells if path))}")
        whole += [f"{hit}." for hit in hits]
    if not whole:
        return list(found.values()), {}
    named = {path: item for item, owners in owners_of_parameters(net) for path, _ in owners
             if path.startswith(tuple(whole))}
    problems += [f"modules_to_save holds {path}, whose type {item.dtype} cannot train: take it out."
                 for path, item in named.items() if item.dtype not in FLOATS and not path.endswith(STATISTICS)]
    ties: Ties = {} if config.keeps_ties else shared_outside(net, named)
    found.update({id(item): item for path, item in named.items() if path not in ties})
    return list(found.values()), ties


def of_the_base(state: AdapterState) -> set[str]:
    """Return the names of base parameters that a file holds because their layer is adapted: those of its biases not."""
    return {name for name in state.trained if name.rpartition(".")[0] in state.layers and not name.endswith("bias")}


def ties(net: nn.Cell, state: AdapterState, found: Found) -> Ties:
    """Return the tied weights that need Parameters of their own for what an adapter has for them.

    They are those that it has for one of their cells alone, as `shared_outside` finds them, and those that it has with
    another value for each. PEFT writes embeddings along that are no module to save: those keep their ties, as there.
    """
    biases = state.config.get("bias") in ("all", "lora_only")
    whole = state.config.get("modules_to_save") or []
    all_are_whole = "peft_type" not in state.config or FIELD in state.config
    own = {path for name, (path, _) in found.items() if name.rpartition(".")[0] not in state.layers
           and not (biases and name.endswith("bias"))
           and (all_are_whole or any(f".{entry}." in f".{name}" for entry in whole))}
    is_one = state.config.get("ensure_weight_tying") and "peft_type" in state.config
    return {**({} if is_one else shared_outside(net, own)), **_parted(net, state, found)}


def tied_problems(net: nn.Cell, new: Mapping[str, Delta], keeps_ties: bool) -> list[str]:
    """Return a sentence for each new delta on a weight that an embedding and another layer share, if ties are kept.

    PEFT gives both layers one adapter then.

    Args:
        net: as it is before.
        new: the deltas that are to be put in, by the path of their layer.
        keeps_ties: an adapter's `ensure_weight_tying`.
    """
    if not keeps_ties:
        return []
    own = {id(item) for delta in new.values() for _, item in delta.base_layer.parameters_and_names(expand=False)}
    shared = [owners for parameter, owners in owners_of_parameters(net) if id(parameter) in own
              and len({id(cell) for _, cell in owners}) > 1
              and any(isinstance(cell, (nn.Embedding, mint.nn.Embedding)) for _, cell in owners)]
    following = {path for path, delta in new.items() if delta.follows_ties}
    return [f"{' and '.join(path for path, _ in owners)} are one weight (tied weights), whose adapters "
            f"ensure_weight_tying makes one, which is not done here: leave both out, train tokens or name one in "
            f"modules_to_save, or set it to false." for owners in shared
            if not following & {path.rpartition(".")[0] for path, _ in owners}]


def _parted(net: nn.Cell, state: AdapterState, found: Found) -> Ties:
    """Return the paths of tied weights for which an adapter has another value than for the first of them."""
    values: dict[int, list[tuple[str, np.ndarray]]] = {}
    for name, (path, parameter) in found.items():
        values.setdefault(id(parameter), []).append((path, state.trained[name]))
    cells = {path: (parameter, cell) for parameter, owners in owners_of_parameters(net) for path, cell in owners}
    return {path: cells[path] for (_, first), *others in values.values() for path, value in others
            if not np.array_equal(value, first)}


def shared_outside(net: nn.Cell, paths: Collection[str]) -> Ties:
    """Return which of these paths of Parameters are ties with a cell of which no path is given, each with its cell."""
    found: dict[str, tuple[Parameter, nn.Cell]] = {}
    for parameter, owners in owners_of_parameters(net):
        inside = {id(cell) for path, cell in owners if path in paths}
        if any(id(cell) not in inside for _, cell in owners):
            found.update({path: (parameter, cell) for path, cell in owners if path in paths})
    return found


def untie(net: nn.Cell, ties: Ties) -> dict[str, Parameter]:
    """Give the cells of tied weights Parameters of their own with the same values, in place; return them by path."""
    own = {}
    for path, (parameter, cell) in ties.items():
        own[path] = Parameter(copy_of(parameter), name=path, requires_grad=parameter.requires_grad)
        set_parameter(cell, path.rpartition(".")[2], own[path])
    if own:
        drop_compiled_graphs(net)
    return own


def find_trained(state: AdapterState, net: nn.Cell, problems: list[str]) -> Found:
    """Return where the net has each base parameter of an adapter, and add every problem found."""
    places = {name: (names[0], parameter) for parameter, names in net_parameters(net) for name in names}
    for parameter, owners in owners_of_parameters(net):
        places.update({path: (path, parameter) for path, _ in owners if path in places})
    # Other frameworks call every layer's parameters weight and bias.
    other = {pytorch_name(name): place for name, place in places.items() if pytorch_name(name) != name}
    places = {**other, **places}
    for name, value in state.trained.items():
        if name not in places:
            problems.append(f"unexpected: the net has no parameter {name!r}.{did_you_mean(name, places)}")
        elif tuple(places[name][1].shape) != value.shape:
            problems.append(f"misshapen: {name} is {tuple(places[name][1].shape)} in the net, {value.shape} in the "
                            f"file.")
        else:
            problems.extend(value_problems(name, places[name][1], value))
    return {name: places[name] for name in state.trained if name in places}


def value_problems(name: str, parameter: Parameter, value: np.ndarray) -> list[str]:
    """Return why the values of a file are none for a Parameter; empty if they are."""
    if np.issubdtype(value.dtype, np.floating) != (parameter.dtype in mstype.float_type):
        return [f"of another type: {name} is {parameter.dtype} in the net, {value.dtype} in the file."]
    return [] if np.isfinite(value).all() else [f"not finite: {name} holds NaN or infinite values."]
