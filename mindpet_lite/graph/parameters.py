"""The Parameters of a net, and which of them train."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from mindspore import Parameter, nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.graph.adapters import deltas_in, saved_of
from mindpet_lite.graph.tree import cells_by_path, paths_of_parameters, refresh_recomputation

# What a BatchNorm of `mindspore.nn` or of `mindspore.mint` counts: Parameters that do not train.
STATISTICS = ("moving_mean", "moving_variance", "running_mean", "running_var", "num_batches_tracked")


def net_parameters(net: nn.Cell) -> list[tuple[Parameter, list[str]]]:
    """Return the net's Parameters with all names each goes by, without those that only steer a delta."""
    settings = {id(parameter) for cell in cells_by_path(net).values() if isinstance(cell, Delta)
            for parameter in cell.setting_parameters().values()}
    return [(parameter, list(dict.fromkeys([*paths, parameter.name])))
            for parameter, paths in paths_of_parameters(net) if id(parameter) not in settings]


def apply_trains(net: nn.Cell, parameters: list[tuple[Parameter, list[str]]], trains: list[bool]) -> None:
    """Set for each Parameter of `net` whether it trains."""
    for (parameter, _), value in zip(parameters, trains):
        parameter.requires_grad = value
    refresh_recomputation(net)


def what_trains(parameters: list[tuple[Parameter, list[str]]], cells: Mapping[str, nn.Cell],
                adapted: Iterable[Delta], saved: Iterable[Parameter]) -> list[bool]:
    """Return for each Parameter whether it trains when an adapter is put in.

    That is what the adapter trains, and what trains of the adapters that the net has already.

    Args:
        parameters: of the net and the new deltas, as `net_parameters` lists them.
        cells: of the net, by path.
        adapted: the deltas of the adapter.
        saved: the base Parameters that belong to it.
    """
    present = deltas_in(cells).values()
    own = {id(item) for item in saved} | {id(item) for delta in adapted for item in delta.delta_parameters().values()}
    others = saved_of(present).keys() | {id(item) for delta in present for item in delta.delta_parameters().values()}
    # What a BatchNorm counts belongs to its module, but does not train.
    return [not names[0].endswith(STATISTICS) and (id(item) in own or id(item) in others and item.requires_grad)
            for item, names in parameters]


def parameters_with(net: nn.Cell, adapted: Mapping[str, Delta]) -> list[tuple[Parameter, list[str]]]:
    """Return the Parameters of a net and of new deltas, those last, as `net_parameters` lists them.

    The new ones get names that no other has: after the base layer's name, else by the path.

    Args:
        net: that the deltas are not in yet.
        adapted: the new deltas by the path they will have.
    """
    base = net_parameters(net)
    _settle_names([parameter for parameter, _ in paths_of_parameters(net)], adapted)
    names_in_base = {id(parameter): names for parameter, names in base}
    own = {id(parameter): (parameter, names_in_base.get(id(parameter), [f"{path}.{name}"]))
           for path, delta in adapted.items() for name, parameter in delta.delta_parameters().items()}
    return [item for item in base if id(item[0]) not in own] + list(own.values())


def _settle_names(of_net: list[Parameter], adapted: Mapping[str, Delta]) -> None:
    taken = {parameter.name for parameter in of_net}
    settled = {id(parameter) for parameter in of_net}
    for path, delta in adapted.items():
        own = {name: parameter for name, parameter in {**delta.delta_parameters(), **delta.setting_parameters()}.items()
               if id(parameter) not in settled}
        # What layers share has the name that it got with the first of them.
        settled.update(id(getattr(delta, name)) for name in delta.shared_names)
        if any(parameter.name in taken or "." not in parameter.name for parameter in own.values()):
            for name, parameter in own.items():
                parameter.name = f"{path}.{name}"
        taken.update(parameter.name for parameter in own.values())
