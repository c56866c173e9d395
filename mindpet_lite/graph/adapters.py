"""What an adapter is on a net: a record that its layers share."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.parts import put
from mindpet_lite.graph.tree import cells_by_path, without_inner

# Where a layer keeps the deltas of methods that add nothing to it: an attribute, so that it goes where the layer goes.
_SELECTED = "mindpet_selected"


@dataclasses.dataclass(eq=False)
class SavedParameter:
    """A base Parameter that belongs to an adapter, such as a new head.

    Args:
        parameter: of the net.
        other: the value that is not in place now: the base's, or the adapter's while that is switched off. None for a
            Parameter that stands in the adapter's file but is the base's own.
        path: that the adapter means, where tied weights have several.
        is_base: whether the base's value is in place.
        file_type: the type that its file has it in; it is written so again where that changes nothing.
    """

    parameter: Parameter
    other: Tensor | None
    path: str = ""
    is_base: bool = False
    file_type: np.dtype | None = None

    def switch(self, to_base: bool) -> None:
        """Put the base's value or the adapter's in place, into the Parameter's own memory."""
        if self.other is not None and to_base != self.is_base:
            value, self.other, self.is_base = self.other, copy_of(self.parameter), to_base
            put(self.parameter, value)

    def set_trained(self, value: Tensor) -> None:
        """Make `value` the adapter's."""
        if self.is_base:
            self.other = value
        else:
            put(self.parameter, value)

    def trained(self) -> Tensor:
        """Return the adapter's value, whichever is in place."""
        return self.other if self.is_base and self.other is not None else self.parameter


@dataclasses.dataclass(eq=False)
class Adapter:
    """The record of an adapter; each of its deltas refers to it (`Delta.adapter`).

    Args:
        config: fields of the config it was loaded with, which are written again.
        carried: tensors of its file that have no place in a net, likewise.
        component: of a diffusion pipeline that its file is of, where the net's paths do not say it.
        saved: the base Parameters that belong to it.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    saved: list[SavedParameter] = dataclasses.field(default_factory=list)
    component: str = ""

    def save(self, parameters: Iterable[Parameter]) -> None:
        """Make base Parameters part of the adapter; their values now are kept as the base's."""
        known = {id(item.parameter) for item in self.saved}
        self.saved += [SavedParameter(parameter, copy_of(parameter)) for parameter in parameters
                       if id(parameter) not in known]


def deltas(net: nn.Cell) -> dict[str, Delta]:
    """Return the deltas of `net` by the path of their layer, each once; raise ValueError where there is none."""
    found = deltas_in(cells_by_path(net))
    if not found:
        trains = [item.name for item in net.trainable_params()]
        some = 0 < len(trains) < len(list(net.get_parameters()))
        raise ValueError("The net has no adapted layer: adapt it with get_pet_model(), or build it with layers such "
                         "as LoRADense. (After merge() the layers are plain.)" + (
                             f" What trains here is {', '.join(trains[:3])}{' and more' if len(trains) > 3 else ''}: "
                             f"TrainableParamsCheckPoint saves that." if some else ""))
    return found


def deltas_in(cells: Mapping[str, nn.Cell]) -> dict[str, Delta]:
    """Return the deltas of a net of these cells: adapted cells, and those that methods which add nothing left on cells.

    A cell that is shared stands under its first path.
    """
    found: dict[int, tuple[str, Delta]] = {}
    for path, cell in without_inner(cells).items():
        delta = cell if isinstance(cell, Delta) else vars(cell).get(_SELECTED)
        if delta is not None:
            found.setdefault(id(cell), (path, delta))
    return dict(found.values())


def select(cell: nn.Cell, delta: Delta | None) -> None:
    """Leave the delta of a method that adds nothing on its layer; None takes it away."""
    if delta is None:
        vars(cell).pop(_SELECTED, None)
    else:
        # Not through Cell.__setattr__, which would take its Parameters for children.
        object.__setattr__(cell, _SELECTED, delta)


def adapters_of(found: Iterable[Delta]) -> list[Adapter]:
    """Return the records of some deltas, each once; a layer that was built by hand has none."""
    return list({id(delta.adapter): delta.adapter for delta in found if delta.adapter is not None}.values())


def record_of(found: Iterable[Delta]) -> Adapter:
    """Return the record that deltas of one adapter share; give it to those that have none yet."""
    found = list(found)
    record = next(iter(adapters_of(found)), None) or Adapter()
    for delta in found:
        delta.adapter = delta.adapter or record
    return record


def saved_of(found: Iterable[Delta]) -> dict[int, SavedParameter]:
    """Return the base Parameters that belong to the adapters of some deltas, by their ids."""
    return {id(item.parameter): item for adapter in adapters_of(found) for item in adapter.saved}


def of_method(found: Mapping[str, Delta]) -> Iterator[tuple[str, dict[str, Delta]]]:
    """Yield each method of a net's deltas with its own."""
    for method in dict.fromkeys(delta.method for delta in found.values()):
        yield method, {path: delta for path, delta in found.items() if delta.method == method}


def copy_of(parameter: Parameter) -> Tensor:
    """Return the value in memory of its own: an operator's copy would be lazy, and see the new value."""
    if parameter.dtype == mindspore.bfloat16:
        return Tensor(parameter.astype(mindspore.float32).asnumpy().copy()).astype(mindspore.bfloat16)
    return Tensor(parameter.asnumpy().copy())
