"""A linear layer with its weight in NormalFloat-4 with double quantisation: QLoRA, section 3.

Dettmers et al., 2023, https://arxiv.org/abs/2305.14314. What each byte and each scale means is in
`mindpet_lite.formats.quantised`.
"""
from __future__ import annotations

from typing import ClassVar

import mindspore
from mindspore import Tensor, ops

from mindpet_lite.delta.hosts.quantised import Product, Quantised, scaled_codes
from mindpet_lite.formats.quantised import DYNAMIC, NF4_BLOCK, SCALE_BLOCK, byte_values


class NF4Product(Product):
    """h Wᵀ for a weight of which each byte is looked up: it means two numbers."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.size = shape[0] * shape[1]
        self.gather = ops.Gather()
        self.values, self.dynamic = Tensor(byte_values()), Tensor(DYNAMIC)

    def scales(self, scale: Tensor, scale_scale: Tensor, mean: Tensor) -> Tensor:
        """Return the scale of each block in float32: (blocks, 1)."""
        groups, blocks = scale_scale.shape[0], scale.shape[0]
        each = ops.reshape(self.tile(ops.reshape(scale_scale, (-1, 1)), (1, SCALE_BLOCK)), (-1,))
        if groups * SCALE_BLOCK != blocks:
            each = each[:blocks]
        numbers = self.gather(self.dynamic, ops.cast(scale, mindspore.int32), 0)
        means = self.tile(ops.reshape(mean, (1,)), (blocks,))
        return ops.reshape(numbers * each + means, (-1, 1))

    def weight(self, codes: Tensor, scale: Tensor, scale_scale: Tensor, mean: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return W."""
        numbers = ops.reshape(self.gather(self.values, ops.cast(codes, mindspore.int32), 0), (-1, NF4_BLOCK))
        scales = self.scales(scale, scale_scale, mean)
        if codes.shape[0] * 2 == self.size:
            return scaled_codes(numbers, scales, self.tile, self.shape, dtype)
        flat = scaled_codes(numbers, scales, self.tile, (-1,), dtype)
        return ops.reshape(flat[:self.size], self.shape)

    def construct(self, h: Tensor, codes: Tensor, scale: Tensor, scale_scale: Tensor, mean: Tensor) -> Tensor:
        """Return h Wᵀ."""
        weight = self.weight(self.depend(codes, h), self.depend(scale, h), self.depend(scale_scale, h),
                             self.depend(mean, h), h.dtype)
        return self.matmul(h, weight)

    def bprop(self, h: Tensor, codes: Tensor, scale: Tensor, scale_scale: Tensor, mean: Tensor, out: Tensor,
              dout: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient by h; what the weight is made of has none."""
        weight = self.weight(self.depend(codes, dout), self.depend(scale, dout), self.depend(scale_scale, dout),
                             self.depend(mean, dout), dout.dtype)
        return (self.turned(dout, weight), ops.zeros_like(codes), ops.zeros_like(scale), ops.zeros_like(scale_scale),
                ops.zeros_like(mean))


class NF4Dense(Quantised):
    """A linear layer with 4 bits for each weight, and 8 and 32 bits for each 64 and each 16,384 of them.

    `weight` (blocks · 32,) uint8 holds two numbers to a byte, the first in the upper half; the weight is taken flat.
    A block of 64 has a scale, `weight_scale` (blocks,) uint8 times `weight_scale_scale` (blocks / 256,) plus
    `weight_scale_mean` (), the last two float32. `weight_error` () is the norm of all errors over the norm of the
    weight. See `mindpet_lite.delta.hosts.quantised.Quantised`.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`.

    Outputs:
        Tensor `(*, out_channels)`.
    """

    plain_name = "NF4Dense"
    quantised_kind: ClassVar[str] = "nf4"
    base_names = ("weight", "bias", "weight_scale", "weight_scale_scale", "weight_scale_mean", "weight_error")

    @classmethod
    def make_product(cls, shape: tuple[int, int]) -> Product:
        """Return the cell that multiplies with a weight of this shape."""
        return NF4Product(shape)

    def product_of(self, h: Tensor) -> Tensor:
        """Return h Wᵀ."""
        return self.quantised_product[0](h, self.weight, self.weight_scale, self.weight_scale_scale,
                                      self.weight_scale_mean)

    def weight_of(self) -> Tensor:
        """Return W in float32."""
        return self.quantised_product[0].weight(self.weight, self.weight_scale, self.weight_scale_scale,
                                             self.weight_scale_mean, mindspore.float32)


NF4Dense.plain_type = NF4Dense
