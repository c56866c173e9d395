"""Linear layers of which each process has a part: columns or rows of one matrix (tensor parallelism).

Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3. With n processes, of which each has
a part Wᵢ of W (outputs, inputs):

    column-split    Wᵢ (outputs / n, inputs)    yᵢ = x Wᵢᵀ + bᵢ           the gradient of x is summed over processes
    row-split       Wᵢ (outputs, inputs / n)    y = Σᵢ xᵢ Wᵢᵀ + b         the output is summed over processes

A column-split layer followed by a row-split one passes its parts on without communication between.
"""
from __future__ import annotations

from typing import ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank

from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.parts import as_type


class CopyToRanks(nn.Cell):
    """x as it is; its gradient is the sum of those of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Return the sum of the gradients."""
        return (self.sum(dout),)


class SumOverRanks(nn.Cell):
    """The sum of the x of all processes; each gets the gradient of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return self.sum(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Return the gradient of the sum."""
        return (dout,)


class SplitDense(DenseHost):
    """What both kinds have in common: a Dense whose weight is this process's part.

    Class attributes:
        weight_axis: the axis of the weight that is split.
        bias_axis: that of the bias; None where each process has the whole bias.
    """

    parts = (*DenseHost.parts, "to_ranks", "over_ranks")
    weight_axis: ClassVar[int]
    bias_axis: ClassVar[int | None]
    is_split = True

    @classmethod
    def of(cls, dense: nn.Dense) -> SplitDense:
        """Return this process's part of a plain Dense, on Parameters of the same names.

        Raises:
            ValueError: it cannot be split so.
        """
        size, rank = get_group_size(), get_rank()
        shape = dense.weight.shape
        if type(dense) is not nn.Dense:
            raise ValueError(f"only a plain nn.Dense is split, but it is a {type(dense).__name__}: split before you "
                             f"adapt or quantise.")
        if dense.activation_flag:
            raise ValueError("it has an activation, which may need all outputs: call the activation outside the layer.")
        if shape[cls.weight_axis] % size:
            raise ValueError(f"its {('outputs', 'inputs')[cls.weight_axis]} are {shape[cls.weight_axis]}, which {size} "
                             f"processes cannot share evenly.")
        layer: SplitDense = nn.Cell.__new__(cls)
        nn.Cell.__init__(layer)
        for name in ("activation", *DenseHost.parts):
            if hasattr(dense, name):
                setattr(layer, name, getattr(dense, name))
        layer.to_ranks, layer.over_ranks = CopyToRanks(), SumOverRanks()
        for name, axis in (("weight", cls.weight_axis), ("bias", cls.bias_axis)):
            old = getattr(dense, name)
            if old is None:
                setattr(layer, name, None)
                continue
            value = old if axis is None else part_of(old.astype(mindspore.float32).asnumpy(), axis, size, rank)
            new = old if axis is None else Parameter(Tensor(value).astype(old.dtype), name=old.name,
                                                     requires_grad=old.requires_grad)
            layer.insert_param_to_cell(name, new)
        layer.out_channels, layer.in_channels = layer.weight.shape
        layer.set_train(dense.training)
        layer.add_flags_recursive(**dense.get_flags())
        return layer


class ColumnDense(SplitDense):
    """A Dense of which each process has some outputs: the input is whole, the output this process's part."""

    plain_name = "a column-split Dense"
    weight_axis, bias_axis = 0, 0
    widen_axis = 0

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Wᵢᵀ."""
        return self.matmul(self.to_ranks(h), weight)

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Wᵢᵀ + bᵢ."""
        return self.biased(self.linear(h, weight, dtype), dtype)

    def affine_and_linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> tuple[Tensor, Tensor]:
        """Return both, by one product."""
        y = self.linear(h, weight, dtype)
        return self.biased(y, dtype), y

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Aᵀ, of which every process makes the same; its gradient is a sum over them."""
        return self.to_ranks(self.lora_a_matmul(h, as_type(a, dtype)))


class RowDense(SplitDense):
    """A Dense of which each process has some inputs: the input is this process's part, the output whole."""

    plain_name = "a row-split Dense"
    weight_axis, bias_axis = 1, None
    narrow_axis = 1

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return Σᵢ hᵢ Wᵢᵀ."""
        return self.over_ranks(self.matmul(h, weight))

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return Σᵢ hᵢ Wᵢᵀ + b."""
        return self.biased(self.linear(h, weight, dtype), dtype)

    def affine_and_linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> tuple[Tensor, Tensor]:
        """Return both, by one product."""
        y = self.linear(h, weight, dtype)
        return self.biased(y, dtype), y

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return Σᵢ hᵢ Aᵢᵀ."""
        return self.over_ranks(self.lora_a_matmul(h, as_type(a, dtype)))


for _kind in (ColumnDense, RowDense):
    # A part is plain by itself: it has the dtype rule and no method.
    _kind.plain_type = _kind


def part_of(value: np.ndarray, axis: int, size: int, rank: int) -> np.ndarray:
    """Return the part of a whole value that process `rank` of `size` has."""
    return np.ascontiguousarray(np.split(value, size, axis)[rank])


def own_part(value: Tensor, axis: int) -> Tensor:
    """Return this process's part of rank 0's whole value; every process must call it."""
    sent = value.astype(mindspore.float32)
    whole = ops.Broadcast(0)((sent,))[0].asnumpy()
    return Tensor(part_of(whole, axis, get_group_size(), get_rank())).astype(value.dtype)


def whole_of(value: np.ndarray, axis: int) -> np.ndarray:
    """Return the whole value of which each process has a part; every process must call it."""
    gathered = ops.AllGather()(Tensor(np.ascontiguousarray(np.moveaxis(value, axis, 0)))).asnumpy()
    return np.ascontiguousarray(np.moveaxis(gathered, 0, axis))


def whole_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return the shape of the whole where this is a part's."""
    return tuple(size * get_group_size() if index == axis else size for index, size in enumerate(shape))
