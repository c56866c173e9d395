"""What `test_laws.py` runs over: one `Case` for each method on each kind of cell, in `cases_<method>.py`."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from nets import inputs, load_values

import mindpet_lite as mp
from mindpet_lite.delta import METHODS, Delta
from mindpet_lite.graph.adapters import deltas


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on one kind of cell, which stands between a frozen head and a frozen tail.

    Args:
        method: its name in METHODS.
        name: of the kind of cell.
        plain: makes the plain layer of a given type.
        by_hand: makes the adapted layer of a given type (for methods that add nothing: the plain one); None for what
            needs the base's weights to start from.
        settings: what the config needs besides target_modules.
        x_shape: of the net's and the layer's input.
        reference: (layer, x, output gradient) -> float64 output, {parameter: gradient} and gradient by x (None for
            ids), for sum(y · output gradient), written from the paper.
        rounds_in_fp16: the plain layer rounds after each operator. The CPU backend computes what has no fp16 kernel in
            fp32, and in a graph of such operators it leaves out the roundings between them.
        head: makes the cell before the layer.
        tail: makes the cell after it.
        ids: for layers that take ids: how many there are. There is no head then.
        starts_as_base: the adapted layer starts with exactly the plain layer's output. Methods that do not say so.
    """

    method: str
    name: str
    plain: Callable[[Any], nn.Cell]
    by_hand: Callable[[Any], nn.Cell] | None
    settings: dict[str, Any]
    x_shape: tuple[int, ...]
    reference: Callable
    rounds_in_fp16: bool = True
    head: Callable[[Any], nn.Cell] = lambda dtype: nn.Dense(6, 6, dtype=dtype)
    tail: Callable[[Any], nn.Cell] = lambda dtype: nn.Dense(4, 3, dtype=dtype)
    ids: int = 0
    starts_as_base: bool = True

    def x(self, dtype=ms.float32) -> Tensor:
        """Return the same input every time."""
        if self.ids:
            return Tensor(np.random.default_rng(0).integers(0, self.ids, self.x_shape).astype(np.int32))
        return inputs(*self.x_shape, dtype=dtype)

    def build(self, how: str, dtype=ms.float32) -> tuple[Net, Net]:
        """Return the plain net and the adapted one with the same base values: by hand, injected, or still plain."""
        plain = Net(self, self.plain(dtype), dtype)
        adapted = Net(self, self.by_hand(dtype) if how == "by hand" and self.by_hand else self.plain(dtype), dtype)
        load_values(adapted, plain)
        if how == "by hand":
            mp.freeze_delta(adapted, self.method, **({"include": ["head.*", "tail.*"]} if self.adds_nothing else {}))
        elif how == "injected":
            mp.get_pet_model(adapted, METHODS[self.method](target_modules=["box.0"], **self.settings))
        return plain, adapted

    @property
    def adds_nothing(self) -> bool:
        """The method trains what is there."""
        return METHODS[self.method].all_by_default


class Net(nn.Cell):
    """A layer between two frozen ones."""

    def __init__(self, case: Case, layer: nn.Cell, dtype=ms.float32) -> None:
        super().__init__()
        self.has_head = not case.ids
        if self.has_head:
            self.head = case.head(dtype)
        self.box = nn.SequentialCell(layer)
        self.tail = case.tail(dtype)

    def construct(self, x):
        """Return head, layer and tail of `x`."""
        if self.has_head:
            x = self.head(x)
        return self.tail(self.box(x))


def layer_of(net: Net) -> nn.Cell:
    """Return the adapted (or plain) layer."""
    return net.box[0]


def delta_of(net: Net) -> Delta:
    """Return what the package knows of the adapted layer."""
    return deltas(net)["box.0"]


def delta_parameters(net: Net) -> list[Parameter]:
    """Return what the method trains."""
    return list(delta_of(net).delta_parameters().values())


def randomise_deltas(net: Net, seed: int = 0) -> None:
    """Give everything that the method trains random values that are not zero."""
    rng = np.random.default_rng(seed)
    for parameter in delta_parameters(net):
        value = 0.3 * rng.standard_normal(parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(value).astype(parameter.dtype))
