"""Base parameters that train beside the deltas, such as a new head: what the base has in their place."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.graph.freeze import net_parameters
from mindpet_lite.graph.tree import drop_compiled_graphs, owners_of_parameters, set_parameter

# PyTorch's names of the Parameters that MindSpore calls otherwise.
_ELSEWHERE = {"gamma": "weight", "beta": "bias", "embedding_table": "weight", "moving_mean": "running_mean",
              "moving_variance": "running_var"}

# The Parameters of a module that do not train.
STATISTICS = ("moving_mean", "moving_variance")
# By its name in a file the path of a Parameter in the net, and itself.
Places = Mapping[str, tuple[str, Parameter]]
# By the path of a Parameter that other cells use too, itself and the cell that is to have its own.
Ties = Mapping[str, tuple[Parameter, nn.Cell]]


@dataclasses.dataclass(eq=False)
class Beside:
    """A base Parameter that belongs to an adapter.

    Args:
        parameter: of the net.
        aside: what is not in place now: the base's value, or the adapter's while it is switched off; None for a
            Parameter that the adapter brings along but does not change.
        path: that the adapter means, where tied weights have several.
        is_base: whether the base's value is in place.
        is_half: whether it came in float16, in which it is written again where that changes nothing.
    """

    parameter: Parameter
    aside: Tensor | None
    path: str = ""
    is_base: bool = False
    is_half: bool = False

    def switch(self, to_base: bool) -> None:
        """Put the base's value or the adapter's in place, into the Parameter's own memory."""
        if self.aside is not None and to_base != self.is_base:
            value, self.aside, self.is_base = self.aside, copy_of(self.parameter), to_base
            put(self.parameter, value)

    def set_trained(self, value: Tensor) -> None:
        """Make `value` the adapter's."""
        if self.is_base:
            self.aside = value
        else:
            put(self.parameter, value)

    def trained(self) -> Tensor:
        """Return the adapter's value, whichever is in place."""
        value = self.aside if self.is_base and self.aside is not None else self.parameter
        half = value.astype(mindspore.float16) if self.is_half else value
        return half if bool((half.astype(mindspore.float32) == value.astype(mindspore.float32)).all()) else value


def beside_of(found: Iterable[Delta]) -> dict[int, Beside]:
    """Return what the deltas have beside them, by the id of its Parameter."""
    return {id(item.parameter): item for delta in found for item in delta.beside}


def copy_of(parameter: Parameter) -> Tensor:
    """Return the value in memory of its own: an operator's copy would be lazy, and see the new value."""
    if parameter.dtype == mindspore.bfloat16:
        return Tensor(parameter.astype(mindspore.float32).asnumpy().copy()).astype(mindspore.bfloat16)
    return Tensor(parameter.asnumpy().copy())


def of_the_base(state: AdapterState) -> set[str]:
    """Return the names of base parameters that a file holds because their layer is adapted: those of its biases not."""
    return {name for name in state.trained if name.rpartition(".")[0] in state.layers and not name.endswith("bias")}


def ties(net: nn.Cell, state: AdapterState, places: Places) -> Ties:
    """Return the tied weights that an adapter has for one of their cells alone, as `shared_outside` does."""
    biases = state.config.get("bias") in ("all", "lora_only")
    return shared_outside(net, {path for name, (path, _) in places.items()
                                if name.rpartition(".")[0] not in state.layers
                                and not (biases and name.endswith("bias"))})


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


def begin_beside(found: Sequence[Delta], parameters: Iterable[Parameter]) -> None:
    """Tell the deltas of a net which base parameters belong to them, and keep the base's values."""
    known = beside_of(found)
    for parameter in parameters:
        known.setdefault(id(parameter), Beside(parameter, copy_of(parameter)))
    for delta in found:
        delta.beside = tuple(known.values())


def bring_along(homes: Iterable[Delta], present: Iterable[Delta], values: Mapping[str, np.ndarray],
                places: Places, unchanged: Collection[str]) -> None:
    """Write the base parameters of an adapter into the net, and tell its deltas of them.

    Args:
        homes: the deltas that the adapter is loaded into.
        present: those that the net had before.
        values: of the parameters, by their names.
        places: where the net has each name.
        unchanged: names of those that are the base's own and not the adapter's.
    """
    known = beside_of(present)
    for name, value in values.items():
        path, parameter = places[name]
        item = known.setdefault(id(parameter), Beside(parameter, None if name in unchanged else copy_of(parameter)))
        item.path, item.is_half = path, value.dtype == np.float16
        item.set_trained(Tensor(value).astype(parameter.dtype))
    for delta in homes:
        delta.beside = tuple(known.values())


def places_of_trained(state: AdapterState, net: nn.Cell, problems: list[str]) -> Places:
    """Return where the net has each base parameter of an adapter, and add every problem found."""
    places = {name: (names[0], parameter) for parameter, names in net_parameters(net) for name in names}
    for parameter, owners in owners_of_parameters(net):
        places.update({path: (path, parameter) for path, _ in owners if path in places})
    # Other frameworks call every layer's parameters weight and bias.
    other = {f"{head}{_ELSEWHERE[last]}": place for name, place in places.items()
             for head, last in [re.split(r"(?=[^.]*$)", name, maxsplit=1)] if last in _ELSEWHERE}
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
