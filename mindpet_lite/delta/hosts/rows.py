"""Linear layers on rows, of any class: y = x Wᵀ + b by plain operators, with W lying either way."""
from __future__ import annotations

from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.delta.hosts.base import Host
from mindpet_lite.delta.parts import as_type, from_rows, to_rows


class RowsHost(Host):
    """The steps of y = x Wᵀ + b on rows, with the operators `matmul` and `bias_add`."""

    is_linear = True

    matmul: ops.MatMul
    bias_add: Any
    has_bias: bool
    out_channels: int

    def arranged(self, x: Tensor) -> Tensor:
        """Return the input as rows."""
        return to_rows(x, x.shape)

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Wᵀ."""
        return self.matmul(h, weight)

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Wᵀ + b."""
        return self.biased(self.linear(h, weight, dtype), dtype)

    def affine_and_linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> tuple[Tensor, Tensor]:
        """Return both, by one product."""
        y = self.linear(h, weight, dtype)
        return self.biased(y, dtype), y

    def biased(self, y: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return y + b where there is a bias."""
        if self.has_bias:
            bias = as_type(self.bias, dtype)
            # PyNative mode waits for each BiasAdd; in a graph on CPU it takes half the time of an Add of two shapes.
            if self.in_graph:
                y = self.bias_add(y, bias)
            else:
                y = y + bias
        return y

    def finish(self, y: Tensor, shape: tuple[int, ...], output_type: mindspore.dtype,
               dtype: mindspore.dtype) -> Tensor:
        """Return the output with the leading axes of the input."""
        return as_type(from_rows(y, shape, self.out_channels), output_type, dtype)

    def add_low_rank_operators(self, rank: int) -> None:
        """Make two matrix products."""
        self.lora_a_matmul, self.lora_b_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Aᵀ."""
        return self.lora_a_matmul(h, as_type(a, dtype))

    def widen(self, low: Tensor, b: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return low Bᵀ."""
        return self.lora_b_matmul(low, as_type(b, dtype))


class TurnedHost(RowsHost):
    """A `RowsHost` whose weight may lie as (inputs, outputs), and that needs nothing of the plain layer but Parameters.

    Class attributes:
        lies_turned: the weight lies as (inputs, outputs).
    """

    parts: ClassVar[tuple[str, ...]] = ()
    lies_turned: ClassVar[bool] = False
    is_turned: bool

    @classmethod
    def turned(cls, layer: nn.Cell) -> bool:
        """Tell whether the weight of a plain or adapted layer lies as (inputs, outputs)."""
        return cls.lies_turned

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        layer.is_turned = cls.turned(source)
        layer.out_channels = cls.logical_shape(source)[0]
        layer.has_bias = len(cls.base_names) > 1 and getattr(source, cls.base_names[1]) is not None
        layer.matmul, layer.bias_add = ops.MatMul(transpose_b=not layer.is_turned), ops.BiasAdd()

    @classmethod
    def logical_shape(cls, layer: nn.Cell) -> tuple[int, ...]:
        """Return (outputs, inputs)."""
        shape = super().logical_shape(layer)
        return shape[::-1] if cls.turned(layer) else shape

    def logical_weight(self) -> Tensor:
        """Return W as (outputs, inputs)."""
        return self.laid_out(self.weight)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a weight (outputs, inputs) as it lies."""
        if self.is_turned:
            return ops.transpose(weight, (1, 0))
        return weight

    def weight_numbers(self) -> np.ndarray:
        """Return the weight in float32 as (outputs, inputs)."""
        value: np.ndarray = self.weight.astype(mindspore.float32).asnumpy()
        return value.T if self.is_turned else value

    def as_weight(self, value: np.ndarray) -> Tensor:
        """Return a weight (outputs, inputs) in the layout and type of the layer's own."""
        return super().as_weight(value.T if self.is_turned else value)
