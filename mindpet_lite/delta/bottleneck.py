"""What the adapter and the low-rank adapter share: a residual bottleneck, and a layer with one after it."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import mindspore
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform

from mindpet_lite.delta.activation import ACTIVATIONS, check_non_linearity
from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.base import Delta, check_float_type, overflow
from mindpet_lite.delta.hosts import TypedCell
from mindpet_lite.delta.parts import as_type, check_strategies, from_rows, prefix_of, to_rows
from mindpet_lite.delta.values import setting_parameter

# As A of LoRA starts: by the width of the input, so that no non-linearity starts where it is flat.
HE_UNIFORM = HeUniform(negative_slope=math.sqrt(5))

# An argument of `shard` by its name, the operator or activation it is for, and its value.
Strategy = tuple[str, Any, "tuple | None"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckSettings:
    """The settings that both adapters have, checked when made."""

    non_linearity: str = "gelu"
    param_init_type: mindspore.dtype = mindspore.float32
    compute_dtype: mindspore.dtype | None = None

    def __post_init__(self) -> None:
        check_non_linearity(self.non_linearity)
        check_float_type("param_init_type", self.param_init_type)
        if self.compute_dtype is not None:
            check_float_type("compute_dtype", self.compute_dtype)
        object.__setattr__(self, "non_linearity", self.non_linearity.lower())


class Steered(Delta, TypedCell):
    """A delta times its `scaling`, which a running graph reads: 1 as trained, 0 the base."""

    setting_names = ("scaling",)
    unmergeable = "the adapter applies a non-linearity to the layer's output, so no weight of the layer equals both."

    scaling: Parameter

    def overflows(self, strength: float) -> str:
        """Return why the scaling cannot be this strength, or nothing."""
        return overflow("the strength", strength, (mindspore.float32, self._compute_type()))

    def setting_values(self) -> dict[str, Any]:
        """Return `strength` as the scaling, or 0 where switched off."""
        return {"scaling": self.strength if self.enabled else 0.0}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return whether the non-linearity is another; other sizes show in the shapes."""
        return Delta.unlike(self, {name: value for name, value in settings.items() if name == "non_linearity"})


class BottleneckLayer(Steered):
    """x + s · up(act(down(x))): base class of the layers of both adapters.

    A subclass makes the activation and the two maps, of which `up` starts at zero, and names them in `_parts`. A map
    has its `bias` and `affine(rows, bias)`, which computes in the type of the rows.
    """

    def __init__(self, hidden_size: int, bottleneck_size: int, settings: BottleneckSettings) -> None:
        super().__init__()
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.non_linearity = settings.non_linearity
        self.compute_dtype = settings.compute_dtype
        # Softmax2d works across the input's own axes, all others on rows.
        self.on_axes = settings.non_linearity == "softmax2d"
        self.scaling = setting_parameter(1.0, "scaling")
        self.reshape = ops.Reshape()
        self.low_mul = ops.Mul()
        self.bias_mul = ops.Mul()
        self.residual_add = ops.Add()

    @staticmethod
    def activation_of(settings: BottleneckSettings) -> nn.Cell:
        """Return a new non-linearity; what it trains has the type of the other parameters."""
        cell = ACTIVATIONS[settings.non_linearity]()
        for parameter in cell.get_parameters():
            parameter.set_dtype(settings.param_init_type)
        return cell

    def _parts(self) -> tuple[nn.Cell, nn.Cell, nn.Cell]:
        """Return the map down, the non-linearity and the map up."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, hidden_size); return the same shape."""
        shape, output_type, dtype = x.shape, self._output_type(x), self._compute_type()
        rows = to_rows(self._entered(x, output_type), shape)
        return from_rows(self.adapted(rows, shape[:-1], dtype), shape, shape[-1])

    def adapted(self, rows: Tensor, leading: tuple[int, ...], dtype: mindspore.dtype) -> Tensor:
        """Return the layer's output for `rows` of any type, computing the delta in `dtype`.

        Args:
            rows: (rows, hidden_size).
            leading: the axes that were flattened to rows.
            dtype: of the computation; the sum is made in the type of `rows`.
        """
        down, non_linear, up = self._parts()
        low = down.affine(as_type(rows, dtype), as_type(down.bias, dtype))
        if self.on_axes:
            low = self.reshape(non_linear(self.reshape(low, leading + (-1,))), low.shape)
        else:
            low = non_linear(low)
        # On the [rows, bottleneck] side, which is the smaller one.
        scale = as_type(self.scaling, dtype)
        delta = up.affine(self.low_mul(low, scale), self.bias_mul(as_type(up.bias, dtype), scale))
        return self.residual_add(rows, as_type(delta, rows.dtype))

    def extend_repr(self) -> str:
        """Show the sizes and the non-linearity."""
        return f"hidden_size={self.hidden_size}, " + ", ".join(
            f"{name}={value}" for name, value in self.settings().items())

    def inner_strategies(self, non_linearity: tuple | None, bias_up: tuple | None,
                         residual: tuple | None) -> list[Strategy]:
        """Return the strategies of what is between and after the two maps, those of the scaling among them."""
        check_strategies({"strategy_non_linearity": non_linearity, "strategy_bias_up_sampler": bias_up})
        return [("strategy_non_linearity", self._parts()[1], non_linearity),
                ("strategy_non_linearity", self.low_mul, (non_linearity[0], ()) if non_linearity else None),
                ("strategy_bias_up_sampler", self.bias_mul, (bias_up[-1], ()) if bias_up else None),
                ("strategy_residual_add", self.residual_add, residual)]


class Bottleneck(Steered, Adapted):
    """A linear layer and a `BottleneckLayer` after it: base class of both adapters on a host.

    A subclass makes that layer in `_add_delta`, under the one name in its `delta_names`.
    """

    def _attach(self, layer: BottleneckLayer) -> None:
        """Put `layer` after this one, its Parameters named beside `weight`."""
        (name,), prefix = self.delta_names, prefix_of(self.weight.name)
        setattr(self, name, layer)
        layer.update_parameters_name(f"{prefix}{name}.")
        # Held here too, so that nothing takes it for one of the trained ones by its name.
        self.insert_param_to_cell("scaling", layer.scaling)
        self.scaling.name = f"{prefix}scaling"
        self.compute_dtype = layer.compute_dtype
        self.bottleneck_size = layer.bottleneck_size

    @property
    def bottleneck(self) -> BottleneckLayer:
        """The layer after this one."""
        return getattr(self, self.delta_names[0])

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, inputs); return (*, outputs)."""
        output_type, dtype = self._output_type(x), self._compute_type()
        y = self.plain_as(x, dtype)
        shape = y.shape
        y = self.bottleneck.adapted(to_rows(y, shape), shape[:-1], dtype)
        return as_type(from_rows(y, shape, shape[-1]), output_type, dtype)

    def delta_parameters(self) -> dict[str, Parameter]:
        """Return what the layer after this one trains, by path below this one."""
        return {f"{self.delta_names[0]}.{path}": item for path, item in self.bottleneck.delta_parameters().items()}

    def settings(self) -> dict[str, Any]:
        """Return the settings of the layer after this one."""
        return self.bottleneck.settings()

    def extend_repr(self) -> str:
        """Show the adapter's settings beside those of the plain layer."""
        own = [f"{name}={value}" for name, value in self.settings().items()]
        return ", ".join(filter(None, [super().extend_repr(), *own]))
