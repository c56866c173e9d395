"""What every method tells the rest of the package about one layer (`Delta`), and checks of types."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype

from mindpet_lite.delta.parts import put
from mindpet_lite.delta.values import Start

FLOAT_TYPES = (mstype.float16, mstype.bfloat16, mstype.float32)
# The types of Parameters that can train.
FLOATS = (*FLOAT_TYPES, mstype.float64)
# From here on rounding gives infinity: half a step above the largest number.
_LIMITS = {mstype.float16: 65520.0, mstype.bfloat16: 2.0 ** 128 - 2.0 ** 119, mstype.float32: 2.0 ** 128 - 2.0 ** 103}


def check_float_type(name: str, value: object) -> None:
    """Raise TypeError unless `value` is mindspore.float16, bfloat16 or float32."""
    if not any(value is item or value == item for item in FLOAT_TYPES):
        raise TypeError(f"{name} must be mindspore.float16, bfloat16 or float32, but got {value!r:.100}.")


def overflow(what: str, number: float, types: Iterable[Any]) -> str:
    """Return in which of the types this number is not finite, as a sentence, or nothing."""
    small = [dtype for dtype in types if not abs(number) < _LIMITS.get(dtype, math.inf)]
    return f"{what} is {number:g}, which {small[0]} cannot hold." if small else ""


def type_refusal(parameter: Parameter, method: str) -> str | None:
    """Return why the layer of this Parameter cannot be adapted, where it is not of a float type; else None."""
    if parameter.dtype in FLOATS:
        return None
    return (f"its {parameter.name.rpartition('.')[2]} is of the type {parameter.dtype}, in which the input and the "
            f"deltas would be cut down to whole numbers: {method} adapts layers of a float type. Give the layer its "
            f"weight in float16 or float32 first, or leave it out with exclude_modules.")


class Delta:
    """What a method tells the rest of the package about one layer; mixed into the cell class of most methods.

    `delta_names` names the attributes that hold what it trains: Parameters, or cells of them. `setting_names` names
    Parameters that are never trained, counted or written to a file: those that hold what the settings say, which a
    compiled graph reads, and constants. `shared_names` names the Parameters that it holds together with the adapter's
    other layers. `output_names` names those of `delta_parameters()` on the side of the layer's
    output, as LoRA's B. `strength` multiplies the delta (1 is the trained adapter, 0 the base), `enabled`
    switches it; `refresh` puts both into effect. `fixed` and `unmergeable` say why a method cannot be steered
    or merged. `foldable` says that some of what trains can be left out for inference, by `fold`.
    """

    method: ClassVar[str]
    delta_names: tuple[str, ...]
    setting_names: tuple[str, ...] = ()
    shared_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()

    strength: float = 1.0
    enabled: bool = True
    # The record of the adapter that this delta is a part of (`graph.adapters.Adapter`); a layer built by hand has none.
    adapter: Any = None
    # What the start took from the base; a layer whose start takes nothing has none.
    start: Start | None = None
    # The types in which the file that this delta was loaded from holds its tensors, by parameter path.
    file_types: Mapping[str, np.dtype] = {}
    fixed: str = ""
    # Its start took a part out of the base's weights that no file of the adapter tells: it belongs to what was left.
    base_is_lost: bool = False
    # What is to make its start from data before it trains (a `data_start.DataStart`); None where nothing is, or has.
    data_start: Any = None
    unmergeable: str = ""
    foldable: bool = False
    # The layer computes with another delta's Parameters, because it has that layer's weight (tied weights): it trains
    # nothing of its own, and stands in no file.
    follows: bool = False
    # Other layers with the same weight are changed with it, by `followers`.
    follows_ties: bool = False
    # By the names of its Parameters of which each process of a job has a part: along which axis.
    split_axes: Mapping[str, int] = {}

    @property
    def base_layer(self) -> Any:
        """The cell that the base's Parameters are in: the adapted layer itself, where the delta is a cell."""
        return self

    def delta_parameters(self) -> dict[str, Parameter]:
        """Return the trained Parameters of this layer by their path below it."""
        found: dict[str, Parameter] = {}
        for name in self.delta_names:
            part = getattr(self, name)
            if isinstance(part, nn.Cell):
                found.update({f"{name}.{path}": item for path, item in part.parameters_and_names()})
            else:
                found[name] = part
        return found

    def setting_parameters(self) -> dict[str, Parameter]:
        """Return the Parameters that are never trained, by attribute name."""
        return {name: getattr(self, name) for name in self.setting_names}

    def delta_norm(self) -> float:
        """Return how large the delta is: the root of the sum of the squares of all it trains."""
        return math.sqrt(sum(float(np.square(float64(item)).sum()) for item in self.delta_parameters().values()))

    def setting_values(self) -> dict[str, Any]:
        """Return what the Parameters of `setting_names` are to hold by the settings, `strength` and `enabled`."""
        raise NotImplementedError(f"{type(self).__name__}.setting_values() is missing: {self.fixed or 'write it'}")

    def refresh(self) -> None:
        """Write `strength` and `enabled` into those Parameters; a running graph sees it at its next call."""
        for name, value in self.setting_values().items():
            put(getattr(self, name), Tensor(value, getattr(self, name).dtype))

    def base_parameter(self) -> Parameter | None:
        """Return the base Parameter that the start is made from, or None where the start takes nothing from it."""
        return None

    def followers(self, cells: Mapping[str, nn.Cell]) -> dict[str, Delta]:
        """Return the other layers of a net that this delta changes with its own, as they are then, by path.

        Args:
            cells: of the net, by path, without this delta.

        Raises:
            ValueError: one of them cannot follow.
        """
        return {}

    def watch_start(self) -> None:
        """Let the start be made again where the base is loaded later, while nothing has trained."""
        if self.base_parameter() is not None:
            self.start = self.start or Start(self)
            self.start.watch()

    def start_again(self) -> None:
        """Make what the start takes from the base again, in place, from the base's values now."""
        raise NotImplementedError(f"{type(self).__name__}.start_again() is missing: write it")

    def overflows(self, strength: float) -> str:
        """Return why this strength is none for the layer, because it would not be finite in there, or nothing."""
        return ""

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return the new value of every base Parameter that absorbs this delta; change nothing."""
        raise NotImplementedError(f"{type(self).__name__}.merged_value() is missing: {self.unmergeable or 'write it'}")

    def plain_cell(self) -> nn.Cell:
        """Return the layer without the delta, on the same base Parameter objects; change nothing."""
        raise NotImplementedError(f"{type(self).__name__}.plain_cell() is missing: {self.unmergeable or 'write it'}")

    def merged_cell(self) -> nn.Cell:
        """Return the layer that stands here after a merge, whose Parameters are those of `merged_value`."""
        found: nn.Cell = self.plain_cell()
        return found

    def fold(self) -> None:
        """Leave out, in place, what only training needs; the output in evaluation stays the same bit for bit."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to fold.")

    def base_values(self) -> dict[Parameter, Tensor]:
        """Return the base Parameters that this delta's start changes, with their new values, for when it is put in."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what a file must hold besides the tensors to rebuild this layer, by config field name."""
        return {}

    def cost(self) -> str:
        """Return in a few words what this layer's settings cost at run time beyond the method itself, or nothing."""
        return ""

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return, a sentence each, which settings of a file are not this layer's and cannot be taken over."""
        return [f"{name} is {value!r} in the net, {settings[name]!r} in the file." for name, value in
                self.settings().items() if name in settings and settings[name] != value]

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over from a file the settings that are values of this layer, such as a scale."""


def float64(value: Tensor) -> np.ndarray:
    """Return a Tensor or Parameter of any float type; numpy has no bfloat16."""
    return value.astype(mstype.float32).asnumpy().astype(np.float64)
