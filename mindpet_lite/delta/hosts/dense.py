"""`mindspore.nn.Dense` as a host, and the steps of every layer that computes as it does."""
from __future__ import annotations

from typing import Any, ClassVar

import mindspore
from mindspore import Tensor, nn

from mindpet_lite.delta.hosts.rows import RowsHost
from mindpet_lite.delta.parts import as_type, from_rows


class ActiveRowsHost(RowsHost):
    """The steps of act(x Wᵀ + b) on rows, with the operators that nn.Dense has: `matmul`, `bias_add`, `activation`."""

    activation_flag: bool
    activation: Any

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        if isinstance(source.activation, nn.Cell):
            layer.insert_child_to_cell("activation", source.activation)
        else:
            layer.activation = source.activation

    def add_flags_recursive(self, **flags: Any) -> ActiveRowsHost:
        """Set flags; the precision flags reach the activation too, unless `compute_dtype` says what it computes in."""
        if isinstance(self.activation, nn.Cell) and self.compute_dtype is None:
            self.activation.add_flags_recursive(**flags)
        return super().add_flags_recursive(**flags)

    def finish(self, y: Tensor, shape: tuple[int, ...], output_type: mindspore.dtype,
               dtype: mindspore.dtype) -> Tensor:
        """Return the output after the activation, with the leading axes of the input."""
        if self.activation_flag:
            y = as_type(self.activation(y), dtype)
        return as_type(from_rows(y, shape, self.out_channels), output_type, dtype)


class DenseHost(ActiveRowsHost, nn.Dense):
    """`nn.Dense` with the dtype rule: act(x Wᵀ + b) on rows."""

    plain_type, plain_name = nn.Dense, "nn.Dense"
    parts: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels", "has_bias", "reshape", "shape_op", "matmul",
                                        "bias_add", "activation_flag")
