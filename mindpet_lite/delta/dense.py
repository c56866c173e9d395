"""What every method on `nn.Dense` shares: the dtype rule, the Dense itself on its own Parameters, the way back."""
from __future__ import annotations

import re
from typing import Any, TypeVar

import mindspore
from mindspore import Parameter, Tensor, context, nn

from mindpet_lite.arguments import check_bool, check_int
from mindpet_lite.delta.activation import as_activation
from mindpet_lite.delta.base import Delta, check_float_type, type_refusal
from mindpet_lite.delta.mixed_precision import NO_CASTS, leave_whole
from mindpet_lite.delta.parts import as_type, check_init, from_rows, to_rows

# What an nn.Dense is made of besides its Parameters and its activation; taken over, not copied.
_DENSE_PARTS = ("in_channels", "out_channels", "has_bias", "reshape", "shape_op", "matmul", "bias_add",
                "activation_flag")
_PRECISION_FLAGS = {"fp16": mindspore.float16, "fp32": mindspore.float32, "bf16": mindspore.bfloat16}

Plain = TypeVar("Plain", bound=nn.Cell)
Typed = TypeVar("Typed", bound="TypedCell")
Self = TypeVar("Self", bound="AdaptedDense")
SomeDense = TypeVar("SomeDense", bound=nn.Dense)


def dense_refusal(cell: nn.Cell, method: str) -> str | None:
    """Return why `cell` is no plain `nn.Dense` that `method` can adapt, or None if it is one."""
    kind = type(cell).__name__
    if isinstance(cell, Delta):
        return f"a {kind} is adapted already{'.' if cell.unmergeable else '; merge() it first.'}"
    if not isinstance(cell, nn.Dense):
        return rewritten_refusal(cell) or f"{method} adapts nn.Dense, not {kind}."
    return override_refusal(cell, nn.Dense, "nn.Dense", method) or type_refusal(cell.weight, method)


def require_float(weight: Parameter, layer: type[nn.Cell]) -> None:
    """Raise TypeError unless the weight of a layer that is built by hand is of a float type."""
    reason = type_refusal(weight, layer.__name__)
    if reason:
        raise TypeError(f"dtype must be a float type: {reason}")


def override_refusal(cell: nn.Cell, plain: type[nn.Cell], plain_name: str, method: str) -> str | None:
    """Return what a user's subclass of the layer `plain` computes otherwise, or None."""
    if isinstance(cell, TypedCell):
        return None
    for name in ("construct", "bprop", "__call__"):
        if getattr(type(cell), name, None) is not getattr(plain, name, None) or name in vars(cell):
            return rewritten_refusal(cell) or (
                f"{type(cell).__name__} overrides {plain_name}.{name}, so {method} cannot know what it computes; "
                f"build it by hand, or leave it out with exclude_modules.")
    return None


def rewritten_refusal(cell: nn.Cell) -> str | None:
    """Return why a cell that level O1 of mixed precision wrote anew cannot be adapted, or None if it is none."""
    # The first class of a name that MindSpore writes in a process has no number: DenseOpt, then DenseOpt_1.
    base = re.fullmatch(r"(\w+)Opt(?:_\d+)?", type(cell).__name__)
    written = re.fullmatch(r"\w+Opt(?:_\d+)?_\d+", type(cell).__module__)
    if base is None or written is None:
        return None
    return (f"mixed precision of level O1 has replaced this {base[1]} by a {type(cell).__name__}: adapt the net first, "
            f"then call auto_mixed_precision(net, 'O1').")


class TypedCell(nn.Cell):
    """A cell with the dtype rule of this package.

    `to_float(t)` means what it means in MindSpore: the input counts as one of type t, and the output has type t. So
    does `to_float(t)` of a net around it. Without, the output has the type of the input.

    In between, the cell computes in `compute_dtype` if given, else in t, else in the type of its Parameters.
    """

    compute_dtype: mindspore.dtype | None = None
    # What `to_float()` set.
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

    def _output_type(self, x: Tensor) -> mindspore.dtype:
        """Return what `to_float()` set, else the type of the input."""
        return x.dtype if self.float_type is None else self.float_type

    def _entered(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the input in `dtype`, by way of the type that `to_float()` set."""
        if self.float_type is None:
            return as_type(x, dtype)
        return as_type(as_type(x, self.float_type), dtype, self.float_type)

    def to_float(self: Typed, dst_type: mindspore.dtype) -> Typed:
        """Set the type that the input counts as and that the output has; see the class for what is between.

        Raises:
            TypeError: `dst_type` is not float16, bfloat16 or float32.
        """
        check_float_type("dst_type", dst_type)
        return super().to_float(dst_type)

    def add_flags_recursive(self: Typed, **flags: Any) -> Typed:
        """Set flags as nn.Cell does, but read the precision flags of `to_float()`, an outer net's too, as `float_type`.

        As a cell flag MindSpore would cast the input before `construct` sees it (graph mode), or cast around every
        operator whatever `compute_dtype` says (PyNative mode).
        """
        for flag, dtype in _PRECISION_FLAGS.items():
            if flags.pop(flag, False):
                self.float_type, self.mixed_precision_type = dtype, NO_CASTS
        return super().add_flags_recursive(**flags)


leave_whole(TypedCell, Delta)


class TypedDense(TypedCell, nn.Dense):
    """A Dense with the dtype rule: the Dense of each method is built on it, and with `compute_dtype` merged into it."""

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, in_channels); return (*, out_channels)."""
        return self._dense(x)

    def _dense(self, x: Tensor) -> Tensor:
        """Return act(x Wᵀ + b) by the dtype rule."""
        shape, output_type, dtype = x.shape, self._output_type(x), self._compute_type()
        y = self._affine(to_rows(self._entered(x, dtype), shape), dtype)
        if self.activation_flag:
            y = as_type(self.activation(y), dtype)
        return as_type(from_rows(y, shape, self.out_channels), output_type, dtype)

    def add_flags_recursive(self, **flags: Any) -> TypedDense:
        """Set flags; the precision flags reach the activation too, unless `compute_dtype` says what it computes in."""
        if isinstance(self.activation, nn.Cell) and self.compute_dtype is None:
            self.activation.add_flags_recursive(**flags)
        return super().add_flags_recursive(**flags)

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


class AdaptedDense(TypedDense, Delta):
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
        require_float(self.weight, type(self))

    @classmethod
    def _on(cls: type[Self], dense: nn.Dense, settings: Any) -> Self:
        """Return the adapted layer on the Parameter objects of `dense`, which stays as it is."""
        layer = dense_on(cls, dense)
        layer._add_delta(settings)
        layer._plain = (dense,)
        take_types(layer, dense)
        return layer

    def _add_delta(self, config: Any) -> None:
        raise NotImplementedError

    def plain_cell(self) -> nn.Dense:
        """Return the nn.Dense this layer adapts, or one on the same Parameters; with `compute_dtype`, one with it."""
        if self._plain and keeps_types(self, self._plain[0]):
            return as_running(self._plain[0], self)
        return as_running(dense_on(TypedDense if self.compute_dtype else nn.Dense, self), self)

    def cost(self) -> str:
        """Say that the weight is cast on every call, where the layer computes in another type."""
        dtype = self._compute_type()
        return "" if dtype == self.weight.dtype else f"casts its {self.weight.dtype} weight to {dtype} on every call"


def take_types(layer: TypedCell, plain: nn.Cell) -> None:
    """Give a new layer the types of the plain one it is made on, unless its own settings say otherwise."""
    if isinstance(plain, TypedCell):
        layer.compute_dtype, layer.float_type = layer.compute_dtype or plain.compute_dtype, plain.float_type
    # Training state, recomputation and the like; the precision flags become the layer's own.
    layer.add_flags_recursive(**plain.get_flags())


def keeps_types(layer: TypedCell, plain: nn.Cell) -> bool:
    """Tell whether the plain layer computes in what `layer` does, or `layer` was told nothing else."""
    return layer.compute_dtype is None or layer.compute_dtype == getattr(plain, "compute_dtype", None)


def as_running(plain: Plain, layer: TypedCell) -> Plain:
    """Return the layer that takes the place of `layer`, in its mode and with the type that `to_float()` set."""
    plain.set_train(layer.training)
    if isinstance(plain, TypedCell):
        plain.compute_dtype = layer.compute_dtype
    if layer.float_type is not None:
        plain.to_float(layer.float_type)
    return plain


def dense_on(kind: type[SomeDense], source: nn.Dense) -> SomeDense:
    """Return a Dense on the parts of `source`, without renaming a Parameter (a plain assignment would)."""
    layer: SomeDense = nn.Cell.__new__(kind)
    nn.Cell.__init__(layer)
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
    return layer
