"""A net with layers that stand in it several times, each with an adapter of its own: PEFT's `layer_replication`."""
from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mindspore import nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.graph.adapters import adapters_of, deltas_in
from mindpet_lite.graph.tree import cells_by_path, set_cells

# From a layer to one after the last, in the order in which they run.
Ranges = Sequence[Sequence[int]]
# How the lists of layers that are meant are called, as in PEFT: Llama's, BERT's and Falcon's.
_LISTS = ("layers", "encoder.layer", "h")


@contextmanager
def replicated(net: nn.Cell, ranges: Ranges | None) -> Iterator[None]:
    """Let the net have its layers as the ranges say, from now on; as they were again where the block raises.

    ``[[0, 4], [2, 5]]`` gives the layers 0, 1, 2, 3, 2, 3, 4. The first of those that are one layer is the layer
    itself; the others are copies with the same Parameters. A layer in no range is left out.

    Raises:
        ValueError: the net has not one list of layers called so, or its layers are adapted, or were replicated
            otherwise; or a range reaches beyond the list. The net is unchanged.
    """
    if not ranges or _replication_of(net) == [list(part) for part in ranges]:
        yield
        return
    path, layers = _list_of_layers(net)
    before = list(layers)
    beyond = [list(part) for part in ranges if part[1] > len(before)]
    if beyond:
        raise ValueError(f"layer_replication has the range {beyond[0]}, but {path} holds {len(before)} layers.")
    adapted = [name for name, cell in cells_by_path(layers).items() if isinstance(cell, Delta)]
    if adapted or _replication_of(net):
        raise ValueError(f"layer_replication is for a net whose layers are not adapted and stand once, but in {path} "
                         f"{adapted[0] if adapted else 'they were replicated already'}: take the net anew.")
    found: list[nn.Cell] = []
    for start, end in ranges:
        for index in range(start, end):
            layer = before[index]
            found.append(_copy_of(layer) if any(layer is other for other in found) else layer)
    numbers = [(cell, cell.layer_idx) for cell in _numbered_cells(before)]
    set_cells(net, layers, found)
    for place, layer in enumerate(found):
        for cell in _numbered_cells([layer]):
            cell.layer_idx = place
    try:
        yield
    except BaseException:
        set_cells(net, layers, before)
        for cell, number in numbers:
            cell.layer_idx = number
        raise


def _replication_of(net: nn.Cell) -> list[list[int]]:
    """Return the ranges by which an adapter replicated the net's layers; empty where none did."""
    return next((record.replication for record in adapters_of(deltas_in(cells_by_path(net)).values())
                 if record.replication), [])


def _list_of_layers(net: nn.Cell) -> tuple[str, nn.CellList]:
    cells = cells_by_path(net)
    found = {path: cell for path, cell in cells.items() if isinstance(cell, nn.CellList)
             and any(path == name or path.endswith("." + name) for name in _LISTS)}
    if len(found) != 1:
        raise ValueError(f"layer_replication needs a net with one CellList called {', '.join(_LISTS)}, but this one "
                         f"has {', '.join(found) or 'none'}.")
    return next(iter(found.items()))


def _copy_of(layer: nn.Cell) -> nn.Cell:
    """Return a copy of a layer on the same Parameters."""
    shared: dict[int, object] = {id(item): item for item in layer.get_parameters()}
    found: nn.Cell = copy.deepcopy(layer, shared)
    return found


def _numbered_cells(layers: Sequence[nn.Cell]) -> list[nn.Cell]:
    """Return the cells that know the number of their layer, as Hugging Face's do for their caches."""
    return [cell for layer in layers for cell in cells_by_path(layer).values() if "layer_idx" in vars(cell)]
