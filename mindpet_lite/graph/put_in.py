"""Put an adapter into a net: what injecting a config and loading a file have in common."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from mindspore import Parameter, nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.values import set_value
from mindpet_lite.graph.adapters import Adapter, deltas_in, record_of, select
from mindpet_lite.graph.modules_to_save import Ties, untie
from mindpet_lite.graph.parents import refusal_at
from mindpet_lite.graph.statistics import warn_of_statistics
from mindpet_lite.graph.tree import cells_by_path, owners_of_parameters, paths_of_parameters, replace


def adapt(config: DeltaConfig, path: str, cells: Mapping[str, nn.Cell]) -> Delta:
    """Return the adapted cell that takes the place of the one at `path`, which stays as it is.

    Raises:
        TypeError, ValueError: it cannot be adapted so.
    """
    reason = refusal_at(config, path, cells)
    if reason:
        raise TypeError(reason)
    delta = config.adapt(cells[path])
    if not isinstance(delta, Delta):
        raise TypeError(f"{type(config).__name__}.adapt() must return a Delta, but got {type(delta).__name__}.")
    return delta


def followers_of(new: Mapping[str, Delta], cells: Mapping[str, nn.Cell], taken: Iterable[nn.Cell],
                 problems: list[str]) -> dict[nn.Cell, Delta]:
    """Return the layers that new deltas change besides their own, each with what takes its place.

    Args:
        new: the deltas that are to be put in, by the path of their layer.
        cells: of the net, by path.
        taken: the cells that are adapted or train whole.
        problems: a sentence each.
    """
    taken_ids = {id(cell) for cell in taken}
    found: dict[nn.Cell, Delta] = {}
    for path, delta in new.items():
        try:
            more = delta.followers(cells)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        problems += [f"{path}: {place} has the same weight (tied weights), and computes with what trains here: it can "
                     f"neither be adapted nor train whole besides. Leave it out, or give it a weight of its own."
                     for place in more if id(cells[place]) in taken_ids]
        found.update({cells[place]: follower for place, follower in more.items()})
    return found


def start_problems(net: nn.Cell, new: Mapping[str, Delta]) -> list[str]:
    """Return a sentence for each delta whose start takes a part out of a weight that another layer uses too.

    Args:
        net: as it is before.
        new: the deltas that are to be put in, by the path of their layer.
    """
    takes = {id(parameter): path for path, delta in new.items() for parameter in delta.base_values()}
    if not takes:
        return []
    shared = {takes[id(parameter)]: [path for path, _ in owners] for parameter, owners in owners_of_parameters(net)
              if id(parameter) in takes and len({id(cell) for _, cell in owners}) > 1}
    return [f"{path}: its start takes a part out of the weight, which stands at {', '.join(places)}: the other layer "
            f"would compute with what is left. Choose another init_lora_weights, or give each layer a weight of its "
            f"own." for path, places in shared.items()]


def put_in(net: nn.Cell, cells: Mapping[str, nn.Cell], adapted: Mapping[str, Delta], followers: Mapping[nn.Cell, Delta],
           saved: Iterable[Parameter], ties: Ties, shared: Mapping[str, Parameter]
           ) -> tuple[Adapter, dict[str, Parameter]]:
    """Put the deltas of an adapter into a net, in place; all that can be wrong is known to be right.

    A net has biases that BitFit trains, or another adapter: with both, the biases belong to the other adapter.

    Args:
        net: to change.
        cells: of the net, by path.
        adapted: the adapter's deltas by the path of their layer; those that the net has already stay where they are.
        followers: what takes the place of other layers that the new deltas change, see `followers_of`.
        saved: the base Parameters that belong to the adapter. Their values now are kept as the base's.
        ties: the tied weights of which it saves one place alone.
        shared: the Parameters that its new layers share.

    Returns:
        The record of the adapter, and the Parameters that tied weights got, by path.
    """
    present = deltas_in(cells)
    selected = {path: delta for path, delta in present.items() if not isinstance(delta, nn.Cell)}
    layers = [delta for path, delta in present.items() if path not in selected]
    if layers and any(not isinstance(delta, nn.Cell) for delta in adapted.values()):
        saved = [*saved, *(item for delta in adapted.values() for item in delta.delta_parameters().values())]
        adapted = {}
    method = next((delta.method for delta in [*adapted.values(), *layers]), "")
    record = record_of([*(delta for delta in present.values() if delta.method == method), *adapted.values()])
    for path, delta in selected.items():
        if delta.method != method:
            record.saved += delta.adapter.saved
            select(cells[path], None)
    record.shared = {**record.shared, **shared}
    new = [delta for delta in adapted.values() if delta not in present.values()]
    for delta in new:
        for parameter, value in delta.base_values().items():
            set_value(parameter, value)
    untied = untie(net, ties)
    paths = {id(parameter): places[0] for parameter, places in paths_of_parameters(net)}
    record.untied.update({path: paths[id(ties[path][0])] for path in untied})
    record.save([*saved, *untied.values()])
    swaps: dict[nn.Cell, nn.Cell] = {plain: layer for plain, layer in followers.items() if isinstance(layer, nn.Cell)}
    for path, delta in adapted.items():
        if not isinstance(delta, nn.Cell):
            select(cells[path], delta)
            record.save(delta.delta_parameters().values())
        elif delta is not cells[path]:
            swaps[cells[path]] = delta
    if swaps:
        replace(net, swaps)
    if new:
        warn_of_statistics(net)
    for delta in adapted.values():
        delta.watch_start()
        if delta.start is not None:
            delta.start.note()
    record.watch([delta for delta in deltas_in(cells_by_path(net)).values() if delta.adapter is record],
                 (parameter for parameter, _ in paths_of_parameters(net)))
    return record, untied
