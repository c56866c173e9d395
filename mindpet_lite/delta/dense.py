"""What every method on `nn.Dense` shares: the Dense itself on its own Parameters, the dtype rule, the way back."""
from __future__ import annotations

from typing import Any, TypeVar

import mindspore
from mindspore import Tensor, context, nn

from mindpet_lite.arguments import check_bool, check_int
from mindpet_lite.delta.activation import as_activation
from mindpet_lite.delta.base import Delta, check_float_type
from mindpet_lite.delta.parts import as_type, check_init

# What an nn.Dense is made of besides its Parameters and its activation; taken over, not copied, by `_on`.
_DENSE_PARTS = ("in_channels", "out_channels", "has_bias", "reshape", "shape_op", "matmul", "bias_add",
                "activation_flag")
_PRECISION_FLAGS = {"fp16": mindspore.float16, "fp32": mindspore.float32, "bf16": mindspore.bfloat16}

Typed = TypeVar("Typed", bound="TypedCell")
Self = TypeVar("Self", bound="AdaptedDense")


def dense_refusal(cell: nn.Cell, method: str) -> str | None:
    """Return why `cell` is no plain `nn.Dense` that `method` can adapt, or None if it is one."""
    kind = type(cell).__name__
    if isinstance(cell, Delta):
        return f"a {kind} is adapted already{'.' if cell.unmergeable else '; merge() it first.'}"
    if not isinstance(cell, nn.Dense):
        return f"{method} adapts nn.Dense, not {kind}."
    for name in ("construct", "bprop", "__call__"):
        if getattr(type(cell), name, None) is not getattr(nn.Dense, name, None) or name in vars(cell):
            return (f"{kind} overrides nn.Dense.{name}, so {method} cannot know what it computes; "
                    f"build it by hand, or leave it out with exclude_modules.")
    return None


class TypedCell(nn.Cell):
    """A cell with the dtype rule of this package.

    It computes in `compute_dtype` if given, else in what `to_float()` set, else in the type of its Parameters. Its
    output has the type of its input.
    """

    compute_dtype: mindspore.dtype | None = None
    float_type: mindspore.dtype | None = None

    @property
    def in_graph(self) -> bool:
        """Tell the mode. A condition on it costs nothing in a graph: the compiler reads it before it begins."""
        return context.get_context("mode") == context.GRAPH_MODE

    def _own_type(self) -> mindspore.dtype:
        """Return the type of the Parameters."""
        raise NotImplementedError

    def _compute_type(self) -> mindspore.dtype:
        """Return `compute_dtype`, else what `to_float()` set, else the Parameters' own type."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        if self.float_type is not None:
            return self.float_type
        return self._own_type()

    def to_float(self: Typed, dst_type: mindspore.dtype) -> Typed:
        """Compute in `dst_type` unless `compute_dtype` was given; the output keeps the type of the input.

        Raises:
            TypeError: `dst_type` is not float16, bfloat16 or float32.
        """
        check_float_type("dst_type", dst_type)
        self.float_type = dst_type
        return self

    def add_flags_recursive(self: Typed, **flags: Any) -> Typed:
        """Set flags as nn.Cell does, but read the precision flags of an outer `to_float()` as this layer's own.

        As a cell flag MindSpore would cast the input before `construct` sees its type (graph mode) or cast around
        every operator whatever `compute_dtype` says (PyNative mode).
        """
        for flag, dtype in _PRECISION_FLAGS.items():
            if flags.pop(flag, False):
                self.float_type = dtype
        return super().add_flags_recursive(**flags)


class AdaptedDense(TypedCell, nn.Dense, Delta):
    """A Dense with a delta: base class of the Dense of each method.

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them. A subclass adds its
    Parameters in `_add_delta` and computes in `construct`.
    """

    # The adapted layer in a tuple, so that it is no child: `plain_cell` hands back the very same object.
    _plain: tuple[nn.Dense, ...] = ()

    def __init__(self, in_channels: int, out_channels: int, **dense: Any) -> None:
        check_int("in_channels", in_channels)
        check_int("out_channels", out_channels)
        check_bool("has_bias", dense.get("has_bias", True))
        for name in ("weight_init", "bias_init"):
            # None is nn.Dense's own default where the argument is left out, but no initialiser where it is given.
            if name in dense:
                check_init(name, dense[name])
        super().__init__(in_channels, out_channels, **{**dense, "activation": as_activation(dense.get("activation"))})

    @classmethod
    def _on(cls: type[Self], dense: nn.Dense, settings: Any) -> Self:
        """Return the adapted layer on the Parameter objects of `dense`, which stays as it is."""
        layer = cls.__new__(cls)
        nn.Cell.__init__(layer)
        take_over(layer, dense)
        layer._add_delta(settings)
        layer._plain = (dense,)
        # Training state, recomputation and the like; the precision flags become the layer's own.
        layer.add_flags_recursive(**dense.get_flags())
        return layer

    def _add_delta(self, config: Any) -> None:
        raise NotImplementedError

    def _own_type(self) -> mindspore.dtype:
        return self.weight.dtype

    def _affine(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return x Wᵀ + b for rows `x` of type `dtype`."""
        return self._with_bias(self.matmul(x, as_type(self.weight, dtype)), dtype)

    def _with_bias(self, y: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return y + b where there is a bias."""
        if self.has_bias:
            bias = as_type(self.bias, dtype)
            # PyNative mode waits for each BiasAdd; in a graph on CPU it takes half the time of an Add of two shapes.
            if self.in_graph:
                y = self.bias_add(y, bias)
            else:
                y = y + bias
        return y

    def plain_cell(self) -> nn.Dense:
        """Return the nn.Dense this layer adapts, or a new one on the same Parameter objects."""
        if self._plain:
            plain = self._plain[0]
        else:
            plain = nn.Dense.__new__(nn.Dense)
            nn.Cell.__init__(plain)
            take_over(plain, self)
        plain.set_train(self.training)
        if self.float_type is not None:
            plain.to_float(self.float_type)
        return plain

    def cost(self) -> str:
        """Say that the weight is cast on every call, where the layer computes in another type."""
        dtype = self._compute_type()
        return "" if dtype == self.weight.dtype else f"casts its {self.weight.dtype} weight to {dtype} on every call"


def take_over(layer: nn.Dense, source: nn.Dense) -> None:
    """Make `layer` a Dense on the parts of `source`, without renaming a Parameter (a plain assignment would)."""
    for name in _DENSE_PARTS:
        if hasattr(source, name):
            setattr(layer, name, getattr(source, name))
    layer.insert_param_to_cell("weight", source.weight)
    if source.has_bias:
        layer.insert_param_to_cell("bias", source.bias)
    else:
        # As nn.Dense has it: the compiler does not take a Parameter slot that holds None.
        layer.bias = None
    if isinstance(source.activation, nn.Cell):
        layer.insert_child_to_cell("activation", source.activation)
    else:
        layer.activation = source.activation
    layer.set_train(source.training)
    layer.set_grad(source.requires_grad)
