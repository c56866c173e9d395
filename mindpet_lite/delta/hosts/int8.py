"""A linear layer with its weight in int8, one scale for each output."""
from __future__ import annotations

from typing import ClassVar

import mindspore
from mindspore import Tensor, ops

from mindpet_lite.delta.hosts.quantised import Product, Quantised, scaled_codes


class Int8Product(Product):
    """(h Cᵀ) · s: the scale on the outputs, which are fewer than the weights."""

    def weight(self, codes: Tensor, scale: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W."""
        return scaled_codes(codes, ops.reshape(scale, (-1, 1)), self.tile, self.shape, dtype)

    def scales(self, scale: Tensor, like: Tensor) -> Tensor:
        """Return the scales for each row of outputs."""
        return self.tile(ops.reshape(ops.cast(scale, like.dtype), (1, -1)), (like.shape[0], 1))

    def construct(self, h: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Return h Wᵀ."""
        codes = self.depend(codes, h)
        scale = self.depend(scale, h)
        if h.dtype == mindspore.float16:
            # Sums of codes up to 127 could be more than float16 holds.
            return self.matmul(h, self.weight(codes, scale, h.dtype))
        y = self.matmul(h, ops.cast(codes, h.dtype))
        return y * self.scales(scale, y)

    def bprop(self, h: Tensor, codes: Tensor, scale: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient by h; codes and scales have none."""
        codes_again, scale_again = self.depend(codes, dout), self.depend(scale, dout)
        if dout.dtype == mindspore.float16:
            found = self.turned(dout, self.weight(codes_again, scale_again, dout.dtype))
        else:
            found = self.turned(dout * self.scales(scale_again, dout), ops.cast(codes_again, dout.dtype))
        return found, ops.zeros_like(codes), ops.zeros_like(scale)


class Int8Dense(Quantised):
    """A linear layer whose weight is `weight` (outputs, inputs) int8 times `weight_scale` (outputs,) float32.

    The scale is the largest size in a row over 127, so that an error is at most half of it. `weight_error` () is the
    norm of all errors over the norm of the weight. See `mindpet_lite.delta.hosts.quantised.Quantised`.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`.

    Outputs:
        Tensor `(*, out_channels)`.
    """

    plain_name = "Int8Dense"
    quantised_kind: ClassVar[str] = "int8"
    base_names = ("weight", "bias", "weight_scale", "weight_error")

    @classmethod
    def make_product(cls, shape: tuple[int, int]) -> Product:
        """Return the cell that multiplies with a weight of this shape."""
        return Int8Product(shape)

    def product_of(self, h: Tensor) -> Tensor:
        """Return h Wᵀ."""
        return self.quantised_product[0](h, self.weight, self.weight_scale)

    def weight_of(self) -> Tensor:
        """Return W in float32."""
        return self.quantised_product[0].weight(self.weight, self.weight_scale, mindspore.float32)


Int8Dense.plain_type = Int8Dense
