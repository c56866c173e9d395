"""A linear layer with its weight in int8, one scale for each 32 inputs: GGUF's Q8_0, and Q4_0, without loss."""
from __future__ import annotations

from typing import ClassVar

import mindspore
from mindspore import Tensor, ops

from mindpet_lite.delta.hosts.quantised import Product, Quantised, scaled_codes
from mindpet_lite.formats.quantised import Q8_BLOCK


class Q8Product(Product):
    """h Wᵀ for codes and a scale of each block of inputs, which only the weight can carry."""

    def weight(self, codes: Tensor, scale: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W."""
        return scaled_codes(ops.reshape(codes, (-1, Q8_BLOCK)), ops.reshape(scale, (-1, 1)), self.tile, self.shape,
                            dtype)

    def construct(self, h: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Return h Wᵀ."""
        return self.matmul(h, self.weight(self.depend(codes, h), self.depend(scale, h), h.dtype))

    def bprop(self, h: Tensor, codes: Tensor, scale: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient by h; codes and scales have none."""
        found = self.turned(dout, self.weight(self.depend(codes, dout), self.depend(scale, dout), dout.dtype))
        return found, ops.zeros_like(codes), ops.zeros_like(scale)


class Q8Dense(Quantised):
    """A linear layer whose weight is `weight` (outputs, inputs) int8 times `weight_scale` (outputs, inputs / 32).

    The scales are float16, as GGUF's Q8_0 has them. `weight_error` () is the norm of all errors over the norm of the
    weight. See `mindpet_lite.delta.hosts.quantised.Quantised`.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, which 32 divides.

    Outputs:
        Tensor `(*, out_channels)`.
    """

    plain_name = "Q8Dense"
    quantised_kind: ClassVar[str] = "q8_0"
    base_names = ("weight", "bias", "weight_scale", "weight_error")

    @classmethod
    def make_product(cls, shape: tuple[int, int]) -> Product:
        """Return the cell that multiplies with a weight of this shape."""
        return Q8Product(shape)

    def product_of(self, h: Tensor) -> Tensor:
        """Return h Wᵀ."""
        return self.quantised_product[0](h, self.weight, self.weight_scale)

    def weight_of(self) -> Tensor:
        """Return W in float32."""
        return self.quantised_product[0].weight(self.weight, self.weight_scale, mindspore.float32)


Q8Dense.plain_type = Q8Dense
