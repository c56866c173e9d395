"""What a net knows of its adapters by name, and the layers that hold several at a time (banks)."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from mindspore import nn

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import Delta
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.graph.adapters import Adapter, adapters_of, deltas_in
from mindpet_lite.graph.tree import cells_by_path, replace, structure_changes

# PEFT's name of an adapter that was given none.
DEFAULT = "default"
# Where a net keeps what it knows of its adapters: an attribute of the net itself.
_KEPT = "mindpet_adapters"
_NAME = re.compile(r"\w[\w-]*")


@dataclasses.dataclass
class Named:
    """The adapters of a net by name.

    Args:
        records: what each adapter is.
        active: the weights of those that count.
        method: of those in banks.
        turns: where adapters do not add up, those that are not in the net now.
        live: then the one that is.
        trainable: the names of those that were made to train.
        found: the banks of the net, and `structure_changes()` when they were found.
    """

    records: dict[str, Adapter]
    active: dict[str, float]
    method: str = ""
    turns: dict[str, AdapterState] = dataclasses.field(default_factory=dict)
    live: str = ""
    trainable: set[str] = dataclasses.field(default_factory=set)
    found: tuple[int, dict[str, Any]] = (-1, {})

    @property
    def names(self) -> list[str]:
        """All names."""
        return [*self.records, *self.turns]


def named(net: nn.Cell) -> Named:
    """Return what a net knows of its adapters; the only one of a net that was given no name is called "default"."""
    found = vars(net).get(_KEPT)
    if isinstance(found, Named) and found.found[0] == structure_changes() and found.found[1]:
        return found
    present = deltas_in(cells_by_path(net))
    if isinstance(found, Named) and (present or found.turns):
        return found
    if not present:
        return Named({}, {})
    record = next(iter(adapters_of(present.values())), Adapter())
    trains = any(item.requires_grad for delta in present.values() for item in delta.delta_parameters().values())
    return Named({DEFAULT: record}, {DEFAULT: 1.0}, next(iter(present.values())).method, live=DEFAULT,
                 trainable={DEFAULT} if trains else set())


def keep(net: nn.Cell, known: Named) -> None:
    """Let the net know its adapters."""
    # Not through Cell.__setattr__, which looks at every value.
    object.__setattr__(net, _KEPT, known)


def check_new(name: object, known: Named) -> None:
    """Raise ValueError unless `name` can be that of a new adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or "__" in name:
        raise ValueError(f"the name of an adapter must be of letters, digits, _ and -, but got {name!r:.60}.")
    if name in known.names:
        raise ValueError(f"the net has an adapter {name!r} already: give another name, or delete_adapter() that one "
                         f"first.")


def check_names(names: Iterable[str], known: Named) -> None:
    """Raise ValueError unless the net has adapters of these names."""
    for name in names:
        if name not in known.names:
            raise ValueError(f"the net has no adapter {name!r:.60}; it has "
                             f"{', '.join(known.names) or 'none'}.{did_you_mean(name, known.names)}")


def banks_of(net: nn.Cell) -> dict[str, Any]:
    """Return the layers of a net that can hold several adapters, by path."""
    known = vars(net).get(_KEPT)
    if isinstance(known, Named) and known.found[0] == structure_changes():
        return known.found[1]
    found = {path: delta for path, delta in deltas_in(cells_by_path(net)).items() if hasattr(delta, "slots")}
    if isinstance(known, Named):
        known.found = (structure_changes(), found)
    return found


def plain_cells(net: nn.Cell) -> dict[str, nn.Cell]:
    """Return the cells of a net by path, adapted layers as they are without an adapter."""
    return {path: cell.plain_cell() if isinstance(cell, Delta) and not cell.follows else cell
            for path, cell in cells_by_path(net).items()}


def make_banks(net: nn.Cell, known: Named, more: Iterable[str] = (), method: str = ""
               ) -> tuple[dict[str, Any], dict[nn.Cell, nn.Cell]]:
    """Return a bank for each adapted layer and for plain ones, and what takes the place of what; change nothing.

    Args:
        net: the net.
        known: its adapters.
        more: the paths of plain layers.
        method: of the adapters that are to stand in them.

    Raises:
        ValueError: an adapter that the net has does not add up with others.
    """
    cells = cells_by_path(net)
    present = deltas_in(cells)
    saved = [item.path or item.parameter.name for record in adapters_of(present.values()) for item in record.saved]
    if saved:
        raise ValueError(f"An adapter of the net trains parameters of the base too ({listed(saved, 3)}), which cannot "
                         f"have several values at a time: such an adapter stands alone on a net.")
    banks: dict[str, Any] = {}
    swaps: dict[nn.Cell, nn.Cell] = {}
    problems = []
    for path, delta in present.items():
        if hasattr(delta, "slots"):
            banks[path] = delta
            continue
        try:
            banks[path] = METHODS[delta.method].bank(cells[path], next(iter(known.records), DEFAULT))
            swaps[cells[path]] = banks[path]
            # Of one adapter alone the weight is its strength, which the bank counts by name.
            known.active = {name: delta.strength for name in list(known.records)[:1]} if delta.strength else {}
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ValueError("Adapters that do not add up cannot stand side by side:\n  " + listed(problems))
    for path in more:
        if path not in banks:
            banks[path] = METHODS[method].bank(cells[path], "")
            swaps[cells[path]] = banks[path]
    return banks, swaps


def set_weights(net: nn.Cell, known: Named) -> None:
    """Write the weights of the adapters that count into the banks."""
    for bank in banks_of(net).values():
        bank.set_weights(known.active)


def put_beside(net: nn.Cell, known: Named, name: str, new: Mapping[str, Delta], record: Adapter) -> None:
    """Put the layers of an adapter beside the others.

    Args:
        net: to change.
        known: its adapters.
        name: of the new one.
        new: its layers by path, each on the plain layer's Parameters.
        record: of the adapter.

    Raises:
        ValueError: they do not add up; nothing is changed.
    """
    method = next(iter(new.values())).method
    banks, swaps = make_banks(net, known, new, method)
    for delta in new.values():
        # Tells whether it adds up; nothing is kept of it.
        METHODS[method].bank(delta, name)
    for path, delta in new.items():
        banks[path].take(name, delta)
        for parameter in banks[path].parameters_of(name).values():
            parameter.requires_grad = False
        banks[path].adapter = banks[path].adapter or record
    _add(net, known, name, record)
    known.method = method
    # An empty exchange drops the graphs that hold another structure.
    replace(net, swaps)
    set_weights(net, known)


def write_beside(net: nn.Cell, known: Named, name: str, state: AdapterState, record: Adapter) -> bool:
    """Write an adapter into the room that its layers have, by values; tell whether there was room in all of them.

    Raises:
        ValueError: the room of a layer is too small; nothing is changed.
    """
    banks = banks_of(net)
    if any(path not in banks or not banks[path].room for path in state.layers):
        return False
    for path, layer in state.layers.items():
        try:
            banks[path].free_place(int((layer.settings or {})["lora_rank"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    for path, layer in state.layers.items():
        a, b = (layer.tensors[key].astype(np.float32) for key in banks[path].factor_names)
        banks[path].write(name, layer.settings or {}, a, b)
        banks[path].slots[name].file_types = {key: value.dtype for key, value in layer.tensors.items()}
        banks[path].adapter = banks[path].adapter or record
    _add(net, known, name, record)
    set_weights(net, known)
    return True


def _add(net: nn.Cell, known: Named, name: str, record: Adapter) -> None:
    """Note a new adapter; the first one counts at once."""
    if not known.names:
        known.active = {name: 1.0}
    known.records[name] = record
    keep(net, known)


def state_of(net: nn.Cell, name: str) -> AdapterState:
    """Return one adapter of a net with banks as numpy arrays."""
    known = named(net)
    record = known.records[name]
    layers = {path: LayerState(bank.factors(name), dict(bank.slots[name].settings), known.method)
              for path, bank in banks_of(net).items() if name in bank.slots}
    return AdapterState(known.method, layers, {}, dict(record.config), dict(record.carried), record.component)
