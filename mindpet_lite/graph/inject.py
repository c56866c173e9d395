"""Adapt the layers of an existing net in place."""
from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mindspore import Parameter, nn

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.config import as_config
from mindpet_lite.delta.base import Delta, DeltaConfig
from mindpet_lite.graph.beside import STATISTICS, Ties, begin_beside, shared_outside, untie
from mindpet_lite.graph.freeze import apply_trains, net_parameters, with_lists
from mindpet_lite.graph.live import deltas_in
from mindpet_lite.graph.match import targets
from mindpet_lite.graph.ranks import same_on_all_ranks
from mindpet_lite.graph.tree import cells_by_path, owners_of_parameters, replace


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector: all that is made meanwhile stays, and walking it again and again takes long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():
                # Together they only move what is new to the old objects; else the next collection walks it once more.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def get_pet_model(net: nn.Cell, config: DeltaConfig | Mapping[str, Any] | str | os.PathLike[str]) -> nn.Cell:
    """Adapt the layers that `config` names, in place, and freeze everything but the deltas.

    Works on any Cell, before or after it was first called, in graph mode and PyNative. Base parameters keep their
    names and values, and with the default initialisation the output is unchanged bit for bit. Make the optimizer
    afterwards, from ``net.trainable_params()``.

    Drops the compiled graphs of all nets of the process: each compiles again at its next call.

    In a distributed job what trains starts with the values of rank 0, see `graph.ranks.same_on_all_ranks`. Call it on
    every process, after ``mindspore.communication.init()``.

    Args:
        net: the net to adapt; it is changed in place and returned.
        config: a config such as :class:`mindpet_lite.LoraConfig`, a mapping with `pet_type` and its fields, or the
            path of a YAML file with a `pet_config` block.

    Returns:
        `net`.

    Raises:
        TypeError, ValueError: the config is wrong, or it names layers that do not exist, cannot be adapted or are
            adapted already; or the processes of a data-parallel job adapt different layers. All problems stand in
            one message, and the net is unchanged.
        RuntimeError: another process of a distributed job did not answer. The net is unchanged.
    """
    cells = cells_by_path(net)
    config = as_config(config)
    chosen, problems = targets(cells, config)
    try:
        more = config.more_targets(cells)
        problems += [f"{path}: it is adapted twice by this config." for path in more if path in chosen]
        chosen |= more
    except ValueError as error:
        problems.append(str(error))
    adapted: dict[str, Delta] = {}
    with _uncollected():
        for path, cell in chosen.items():
            try:
                adapted[path] = adapt(config.for_layer(path), cell)
            except (TypeError, ValueError) as error:
                problems.append(f"{path}: {error}")
    if isinstance(adapted.get(""), nn.Cell):
        problems.append("the net itself is the layer to adapt, and it cannot be replaced in place: "
                        "use the adapted layer's own from_dense(), or wrap it in a cell.")
    base = net_parameters(net)
    settle_names(base, adapted)
    kept = {id(parameter) for cell in cells.values() if isinstance(cell, Delta)
            for parameter in cell.delta_parameters().values()}
    own = {id(parameter): (parameter, [f"{path}.{name}"]) for path, delta in adapted.items()
           for name, parameter in delta.delta_parameters().items()}
    beside, shared = _beside(net, cells, config, chosen, problems)
    names_in_base = {id(parameter): names for parameter, names in base}
    parameters = [item for item in base if id(item[0]) not in own] + [
        (parameter, names_in_base.get(id(parameter), names)) for parameter, names in own.values()]
    # What a BatchNorm counts belongs to the module, but does not train.
    trains = [id(parameter) in own or id(parameter) in beside and not names[0].endswith(STATISTICS)
              or (id(parameter) in kept and parameter.requires_grad) for parameter, names in parameters]
    try:
        trains = with_lists(parameters, trains, ("freeze_include", config.freeze_include),
                            ("freeze_exclude", config.freeze_exclude))
        if adapted and not any(trains):
            problems.append(f"freeze_include {config.freeze_include!r} leaves nothing trainable: narrow it, or name "
                            f"what trains in freeze_exclude.")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{type(config).__name__} does not fit the net, which is unchanged:\n  "
                         + "\n  ".join(problems))
    same_on_all_ranks([parameter for (parameter, _), value in zip(parameters, trains) if value])
    for delta in adapted.values():
        set_base_values(delta)
    of_deltas = own.keys() | kept
    along = [parameter for (parameter, _), value in zip(parameters, trains)
             if id(parameter) in beside or value and id(parameter) not in of_deltas]
    apply_trains(net, parameters, trains)
    untied = untie(net, shared)
    for parameter in untied.values():
        parameter.requires_grad = True
    begin_beside([*deltas_in(cells).values(), *adapted.values()], [*along, *untied.values()])
    replace(net, {chosen[path]: delta for path, delta in adapted.items() if isinstance(delta, nn.Cell)})
    return net


def _beside(net: nn.Cell, cells: Mapping[str, nn.Cell], config: DeltaConfig, chosen: Mapping[str, nn.Cell],
            problems: list[str]) -> tuple[set[int], Ties]:
    """Return the ids of the base Parameters that train beside the deltas; add to `problems` what cannot.

    Tied weights of which modules_to_save name one place alone stand apart: they need Parameters of their own.
    """
    adapted = {id(cell) for cell in chosen.values()}
    found = {id(item) for cell in cells.values() for name, item in cell.parameters_and_names(expand=False)
             if config.trains_beside(name, id(cell) in adapted)}
    whole: list[str] = []
    for entry in config.modules_to_save or ():
        hits = [path for path in cells if path == entry or path.endswith("." + entry)]
        inner = [path for path, cell in cells.items() if id(cell) in adapted
                 and any(path == hit or path.startswith(hit + ".") for hit in hits)]
        saved = {id(item) for path in hits for item in cells[path].get_parameters()}
        if inner:
            problems.append(f"modules_to_save entry {entry!r} holds the adapted layer {inner[0]}: take it out of one.")
        elif not saved:
            problems.append(f"modules_to_save entry {entry!r} hits no module with parameters."
                            f"{did_you_mean(entry, (path.rpartition('.')[2] for path in cells if path))}")
        whole += [f"{hit}." for hit in hits]
    if not whole:
        return found, {}
    named = {path: item for item, owners in owners_of_parameters(net) for path, _ in owners
             if path.startswith(tuple(whole))}
    shared = shared_outside(net, named)
    return found | {id(item) for path, item in named.items() if path not in shared}, shared


def adapt(config: DeltaConfig, cell: nn.Cell) -> Delta:
    """Return the adapted cell that takes the place of `cell`, which stays as it is.

    Raises:
        TypeError, ValueError: `cell` cannot be adapted so.
    """
    reason = config.refusal(cell)
    if reason:
        raise TypeError(reason)
    delta = config.adapt(cell)
    if not isinstance(delta, Delta):
        raise TypeError(f"{type(config).__name__}.adapt() must return a Delta, but got {type(delta).__name__}.")
    return delta


def set_base_values(delta: Delta) -> None:
    """Give the base what the start of a new delta takes or leaves of it."""
    for parameter, value in delta.base_values().items():
        parameter.set_data(value)


def settle_names(parameters: list[tuple[Parameter, list[str]]], adapted: Mapping[str, Delta]) -> None:
    """Make the names of new delta Parameters unique: beside the base's name, else by the path.

    Args:
        parameters: those of the net, as `net_parameters` lists them.
        adapted: the new cells by the path they will have.
    """
    taken = {parameter.name for parameter, _ in parameters}
    base = {id(parameter) for parameter, _ in parameters}
    for path, delta in adapted.items():
        own = {name: parameter for name, parameter in {**delta.delta_parameters(), **delta.live_parameters()}.items()
               if id(parameter) not in base}
        if any(parameter.name in taken or "." not in parameter.name for parameter in own.values()):
            for name, parameter in own.items():
                parameter.name = f"{path}.{name}"
        taken.update(parameter.name for parameter in own.values())
