"""`mindspore.nn.Dense` as a host, and the steps of every layer that computes as it does."""
from __future__ import annotations

from typing import Any, ClassVar

import mindspore
from mindspore import Tensor, nn, ops

from mindpet_lite.delta.hosts.base import Host
from mindpet_lite.delta.parts import as_type, from_rows, to_rows


class RowsHost(Host):
    """The steps of act(x Wᵀ + b) on rows, with the operators that nn.Dense has: `matmul`, `bias_add`, `activation`."""

    is_linear = True

    matmul: ops.MatMul
    bias_add: ops.BiasAdd
    has_bias: bool
    activation_flag: bool
    activation: Any
    out_channels: int

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        if isinstance(source.activation, nn.Cell):
            layer.insert_child_to_cell("activation", source.activation)
        else:
            layer.activation = source.activation

    def add_flags_recursive(self, **flags: Any) -> RowsHost:
        """Set flags; the precision flags reach the activation too, unless `compute_dtype` says what it computes in."""
        if isinstance(self.activation, nn.Cell) and self.compute_dtype is None:
            self.activation.add_flags_recursive(**flags)
        return super().add_flags_recursive(**flags)

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
        """Return the output after the activation, with the leading axes of the input."""
        if self.activation_flag:
            y = as_type(self.activation(y), dtype)
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


class DenseHost(RowsHost, nn.Dense):
    """`nn.Dense` with the dtype rule: act(x Wᵀ + b) on rows."""

    plain_type, plain_name = nn.Dense, "nn.Dense"
    parts: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels", "has_bias", "reshape", "shape_op", "matmul",
                                        "bias_add", "activation_flag")
