"""Adapters that do not add up take turns in a net: one is in it, the others wait as numbers."""
from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor, nn

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.adapters import Adapter as Source
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.graph.adapters import adapters_of, deltas_in, select
from mindpet_lite.graph.load import install
from mindpet_lite.graph.named import Named, banks_of, keep, make_banks, named, state_of
from mindpet_lite.graph.save import adapter_state
from mindpet_lite.graph.tree import cells_by_path, replace


def adds_up(net: nn.Cell, config: DeltaConfig) -> bool:
    """Tell whether an adapter of these settings, and those of the net, can stand side by side."""
    try:
        make_banks(net, named(net))
    except ValueError:
        return False
    return METHODS[config.pet_type].holds_several and config.adds_up()


def make_way(net: nn.Cell, known: Named, name: str, put_new: Callable[[], object]) -> None:
    """Let a new adapter be made in the place of the one in the net, and wait for its turn.

    Args:
        net: to change.
        known: its adapters.
        name: of the new one.
        put_new: puts it into the net without adapters.

    Raises:
        TypeError, ValueError: one of them cannot take turns, or the new one does not fit. The net is as before.
    """
    states = _states(net, known)
    live, active = known.live or next(iter(known.active or states)), dict(known.active)
    _take_out(net)
    try:
        put_new()
        states[name] = adapter_state(net)
        _take_out(net)
    finally:
        install(net, Source(states[live], "", ()), f"the adapter {live!r}")
        known = Named({live: named(net).records.popitem()[1]}, active, "",
                      {key: value for key, value in states.items() if key != live}, live)
        keep(net, known)


def take_turn(net: nn.Cell, known: Named, name: str) -> None:
    """Let `name` take the place of the adapter in the net."""
    wanted = known.turns[name]
    now = adapter_state(net)
    present = deltas_in(cells_by_path(net))
    if _is_like(wanted, now):
        for path, delta in present.items():
            for key, parameter in delta.delta_parameters().items():
                put(parameter, Tensor(wanted.layers[path].tensors[key]).astype(parameter.dtype))
            delta.adopt_settings(wanted.layers[path].settings or {})
        record = next(iter(adapters_of(present.values())))
        record.config, record.carried = wanted.config, wanted.carried
    else:
        trains = any(item.requires_grad for delta in present.values() for item in delta.delta_parameters().values())
        _take_out(net)
        install(net, Source(wanted, "", ()), f"the adapter {name!r}")
        for delta in deltas_in(cells_by_path(net)).values():
            for item in delta.delta_parameters().values():
                item.requires_grad = trains
    known.turns[known.live] = now
    known.turns.pop(name)
    record = next(iter(adapters_of(deltas_in(cells_by_path(net)).values())))
    known.records, known.live = {name: record}, name
    keep(net, known)


def _is_like(one: AdapterState, other: AdapterState) -> bool:
    """Tell whether two adapters differ in values alone."""
    return one.method == other.method and not one.shared and not other.shared and {
        path: (layer.settings, {key: value.shape for key, value in layer.tensors.items()})
        for path, layer in one.layers.items()} == {
        path: (layer.settings, {key: value.shape for key, value in layer.tensors.items()})
        for path, layer in other.layers.items()}


def _states(net: nn.Cell, known: Named) -> dict[str, AdapterState]:
    """Return all adapters of a net as numbers."""
    if banks_of(net):
        return {name: state_of(net, name) for name in known.records}
    return {**known.turns, **{name: adapter_state(net) for name in known.records}}


def _take_out(net: nn.Cell) -> None:
    """Put plain layers in the place of adapted ones.

    Raises:
        ValueError: without its adapter the net would not be its base. Nothing is changed.
    """
    cells = cells_by_path(net)
    found = deltas_in(cells)
    problems = [f"{path}: {delta.fixed}" for path, delta in found.items() if delta.fixed]
    problems += [f"{item.path or item.parameter.name} of the base belongs to the adapter"
                 for record in adapters_of(found.values()) for item in record.saved]
    if problems:
        raise ValueError("This adapter cannot make way for another. The net is unchanged:\n  " + listed(problems))
    for delta in found.values():
        if delta.start is not None:
            delta.start.unwatch()
    swaps = {}
    for path, delta in found.items():
        select(cells[path], None)
        swaps[cells[path]] = delta.plain_cell()
    for cell in cells.values():
        if isinstance(cell, Delta) and cell.follows:
            swaps[cell] = cell.plain_cell()
    replace(net, swaps)
