"""What a kind of frozen layer tells the methods that sit on it (`Host`), and the dtype rule of this package."""
from __future__ import annotations

import re
from typing import Any, ClassVar, TypeVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, context, nn

from mindpet_lite.delta.base import Delta, check_float_type, type_refusal
from mindpet_lite.delta.mixed_precision import NO_CASTS, leave_whole
from mindpet_lite.delta.parts import as_type

_PRECISION_FLAGS = {"fp16": mindspore.float16, "fp32": mindspore.float32, "bf16": mindspore.bfloat16}

Plain = TypeVar("Plain", bound=nn.Cell)
Typed = TypeVar("Typed", bound="TypedCell")


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


class Host(TypedCell):
    """A kind of frozen layer: how it applies its own operators, and where its numbers are.

    A kind's class is ``class XHost(Host, X)`` for the plain class X. By itself it is the plain layer with the dtype
    rule; with a method before it (`adapted.Adapted`) it is the adapted layer. A call is these steps::

        h = arranged(entered x)      the input in the shape that the operators take
        y = affine(h, own_weight)    the layer's operators, with the bias
        finish(y)                    the activation, the shape and type of the output

    `linear(h, weight)` is the same map without the bias. A method that has another weight brings it into the layer's
    layout with `laid_out`. For methods a weight is ``(outputs, inputs of a group, *kernel)``, a table ``(ids, size)``.

    Class attributes:
        plain_type: X.
        plain_name: as users write it.
        parts: what a plain layer is made of besides its Parameters: taken over, not copied, by `on`.
        base_names: its Parameters.
        out_axis: the axis of `logical_shape` that counts outputs.
        dims: axes of space that the layer slides over.
        takes_ids: the input is of whole numbers, so that it can be neither scaled nor dropped.
        is_linear: ``"all-linear"`` means it.
        narrow_axis: the axis of the weight of `narrow` of which each process has a part; None where all have the whole.
        widen_axis: likewise of `widen`.
        is_split: each process of a job has a part of the layer.
        is_quantised: the weight is held in few bits, so that nothing can be taken out of it.
        entrance: what stands for `construct` where X is called with more than x, or gives back more than y: a function
            that calls `self.inside(x)`; None where X has neither.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> class Plain(nn.Cell):
        ...     pass
        >>> class PlainHost(mp.Host, Plain):
        ...     plain_type, plain_name = Plain, "Plain"
        >>> PlainHost.matches(Plain()), PlainHost.matches(nn.ReLU())
        (True, False)
    """

    plain_type: ClassVar[type[nn.Cell]]
    plain_name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    base_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    out_axis: ClassVar[int] = 0
    dims: ClassVar[int] = 0
    takes_ids: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False
    narrow_axis: ClassVar[int | None] = None
    widen_axis: ClassVar[int | None] = None
    is_split: ClassVar[bool] = False
    is_quantised: ClassVar[bool] = False
    entrance: ClassVar[Any] = None
    weight: Parameter
    bias: Any

    @classmethod
    def matches(cls, cell: nn.Cell) -> bool:
        """Tell whether a plain or adapted cell is of this kind."""
        return isinstance(cell, cls.plain_type)

    @classmethod
    def on(cls, kind: type[Plain], source: nn.Cell) -> Plain:
        """Return a layer of class `kind`, this or its plain one, on the parts of `source`; no Parameter is renamed."""
        layer: Plain = nn.Cell.__new__(kind)
        nn.Cell.__init__(layer)
        cls._take_parts(layer, source)
        layer.set_train(source.training)
        layer.set_grad(source.requires_grad)
        return layer

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        """Give a new layer what `source` is made of."""
        for name in cls.parts:
            if hasattr(source, name):
                setattr(layer, name, getattr(source, name))
        for name in cls.base_names:
            parameter = getattr(source, name)
            if parameter is None:
                # The compiler does not take a Parameter slot that holds None.
                setattr(layer, name, None)
            else:
                # A plain assignment would rename it.
                layer.insert_param_to_cell(name, parameter)

    @classmethod
    def refusal(cls, cell: nn.Cell, method: str) -> str | None:
        """Return why `cell`, of the kind, cannot be adapted by the method of this name, or None if it can."""
        return (override_refusal(cell, cls.plain_type, cls.plain_name, method)
                or type_refusal(getattr(cell, cls.base_names[0]), method))

    def check(self) -> None:
        """Raise ValueError where the layer's own settings do not go with any update of its weight."""

    # Sizes, of a plain layer or an adapted one.

    @classmethod
    def logical_shape(cls, layer: nn.Cell) -> tuple[int, ...]:
        """Return the shape that the weight has for methods."""
        return tuple(getattr(layer, cls.base_names[0]).shape)

    @classmethod
    def inputs(cls, layer: nn.Cell) -> int:
        """Return how many inputs each place has, those of all groups."""
        return cls.logical_shape(layer)[1 - cls.out_axis] * cls.group_count(layer)

    @classmethod
    def outputs(cls, layer: nn.Cell) -> int:
        """Return how many outputs each place has."""
        return cls.logical_shape(layer)[cls.out_axis]

    @classmethod
    def group_count(cls, layer: nn.Cell) -> int:
        """Return into how many parts, each with its own weights, inputs and outputs are cut."""
        return 1

    @classmethod
    def leaves_bias(cls, layer: nn.Cell) -> bool:
        """Tell whether a plain layer leaves its bias to be added to its output from outside."""
        return False

    @classmethod
    def across(cls, size: int) -> tuple[int, ...]:
        """Return the shape in which one number for each input or output multiplies `h` or `y`."""
        return (1, size, *[1] * cls.dims) if cls.dims else (size,)

    # The steps of a call.

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`."""
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """Return what the plain layer makes of `x`."""
        return self.plain_as(x, self._output_type(x))

    def plain_as(self, x: Tensor, output_type: mindspore.dtype) -> Tensor:
        """Return the same in this type."""
        dtype = self._compute_type()
        h = self.arranged(self._entered(x, dtype))
        return self.finish(self.affine(h, self.own_weight(dtype), dtype), x.shape, output_type, dtype)

    def _own_type(self) -> mindspore.dtype:
        return self.weight.dtype

    def own_weight(self, dtype: mindspore.dtype) -> Tensor:
        """Return the weight as `linear` and `affine` take it."""
        return as_type(self.weight, dtype)

    def logical_weight(self) -> Tensor:
        """Return the weight in `logical_shape` and its own type."""
        return self.weight

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a weight of `logical_shape` as `linear` and `affine` take it."""
        return weight

    def arranged(self, x: Tensor) -> Tensor:
        """Return the input in the shape that the operators take."""
        return x

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what the layer's operators make of `h` with this weight, without a bias, in `dtype`."""
        raise NotImplementedError

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the same with the layer's bias, where it has one."""
        raise NotImplementedError

    def affine_and_linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> tuple[Tensor, Tensor]:
        """Return both."""
        return self.affine(h, weight, dtype), self.linear(h, weight, dtype)

    def finish(self, y: Tensor, shape: tuple[int, ...], output_type: mindspore.dtype,
               dtype: mindspore.dtype) -> Tensor:
        """Return the output: `y` of type `dtype` after the activation, for an input of this shape."""
        return as_type(y, output_type, dtype)

    # A map to few channels and one from there, as LoRA has them.

    @classmethod
    def narrow_shape(cls, layer: nn.Cell, rank: int) -> tuple[int, ...]:
        """Return the shape of the weight of `narrow`."""
        return rank, cls.inputs(layer), *cls.logical_shape(layer)[2:]

    @classmethod
    def widen_shape(cls, layer: nn.Cell, rank: int) -> tuple[int, ...]:
        """Return the shape of the weight of `widen`."""
        return cls.outputs(layer), rank

    def add_low_rank_operators(self, rank: int) -> None:
        """Make the operators of `narrow` and `widen`."""
        raise NotImplementedError

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what the layer's map makes of `h` with the weight `a` of `rank` outputs."""
        raise NotImplementedError

    def widen(self, low: Tensor, b: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the outputs that `b` makes of `low`, place by place."""
        raise NotImplementedError

    # The numbers.

    def weight_numbers(self) -> np.ndarray:
        """Return the weight in float32 and `logical_shape`."""
        return self.weight.astype(mindspore.float32).asnumpy().reshape(self.logical_shape(self))

    def as_weight(self, value: np.ndarray) -> Tensor:
        """Return a weight of `logical_shape` in the layout and type of the layer's own."""
        return Tensor(np.ascontiguousarray(value).reshape(self.weight.shape)).astype(self.weight.dtype)

    def absorbing(self) -> Parameter:
        """Return the Parameter that holds a merged weight."""
        return self.weight

    def absorbed(self, plain: nn.Cell) -> nn.Cell:
        """Return the layer that stands here after a merge, given the plain one."""
        return plain

    def base_numbers(self) -> dict[str, np.ndarray]:
        """Return the weight as `weight_numbers` does and, where there is one, the bias."""
        found = {"weight": self.weight_numbers()}
        return {**found, "bias": self.bias.astype(mindspore.float32).asnumpy()} if self.adds_bias() else found

    def adds_bias(self) -> bool:
        """Tell whether `affine` adds a bias."""
        return getattr(self, "bias", None) is not None


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
