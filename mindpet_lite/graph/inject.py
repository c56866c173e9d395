"""Adapt the layers of an existing net in place."""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mindspore import Parameter, nn

from mindpet_lite.config import as_config
from mindpet_lite.delta.base import Delta, DeltaConfig
from mindpet_lite.graph.freeze import net_parameters
from mindpet_lite.graph.match import selector, targets
from mindpet_lite.graph.tree import cells_by_path, replace


def get_pet_model(net: nn.Cell, config: DeltaConfig | Mapping[str, Any] | str | os.PathLike[str]) -> nn.Cell:
    """Adapt the layers that `config` names, in place, and freeze everything but the deltas.

    Works on any Cell, before or after it was first called, in graph mode and PyNative. Base parameters keep their
    names and values, and with the default initialisation the output is unchanged bit for bit. Make the optimizer
    afterwards, from ``net.trainable_params()``.

    Args:
        net: the net to adapt; it is changed in place and returned.
        config: a config such as :class:`mindpet_lite.LoraConfig`, a mapping with `pet_type` and its fields, or the
            path of a YAML file with a `pet_config` block.

    Returns:
        `net`.

    Raises:
        TypeError, ValueError: the config is wrong, or it names layers that do not exist, cannot be adapted or are
            adapted already. All problems stand in one message, and the net is unchanged.
    """
    cells = cells_by_path(net)
    config = as_config(config)
    chosen, problems = targets(cells, config)
    parameters = net_parameters(net)
    try:
        stays, trains = (selector(field, getattr(config, field), [names for _, names in parameters])
                         for field in ("freeze_include", "freeze_exclude"))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{type(config).__name__} does not fit the net, which is unchanged:\n  "
                         + "\n  ".join(problems))
    swaps = {cell: config.adapt(cell) for cell in chosen.values()}
    settle_names(net, {path: swaps[cell] for path, cell in chosen.items()})
    kept = {id(parameter) for cell in cells.values() if isinstance(cell, Delta)
            for parameter in cell.delta_parameters().values()}
    for index, (parameter, _) in enumerate(parameters):
        if id(parameter) not in kept:
            parameter.requires_grad = trains(index) and not stays(index)
    replace(net, swaps)
    return net


def settle_names(net: nn.Cell, adapted: Mapping[str, nn.Cell]) -> None:
    """Make the names of new delta Parameters unique in the net: beside the base's name, else by the path."""
    taken = {parameter.name for parameter, _ in net_parameters(net)}
    for path, cell in adapted.items():
        own = _own_parameters(cell)
        if any(parameter.name in taken or "." not in parameter.name for parameter in own.values()):
            for name, parameter in own.items():
                parameter.name = f"{path}.{name}"
        taken.update(parameter.name for parameter in own.values())


def _own_parameters(cell: nn.Cell) -> dict[str, Parameter]:
    if not isinstance(cell, Delta):
        raise TypeError(f"A config's adapt() must return a Delta, but got {type(cell).__name__}.")
    return {**cell.delta_parameters(), **cell.live_parameters()}
