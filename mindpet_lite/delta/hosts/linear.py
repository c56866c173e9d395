"""`mindspore.mint.nn.Linear` as a host."""
from __future__ import annotations

import mindspore
from mindspore import Tensor, mint

from mindpet_lite.delta.hosts.base import Host
from mindpet_lite.delta.parts import as_type


class LinearHost(Host, mint.nn.Linear):
    """`mint.nn.Linear` with the dtype rule."""

    plain_type, plain_name = mint.nn.Linear, "mint.nn.Linear"
    parts = ("in_features", "out_features", "has_bias", "dense")
    is_linear = True

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Wᵀ."""
        return self.dense(h, weight)

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Wᵀ + b, by one operator."""
        return self.dense(h, weight, as_type(self.bias, dtype) if self.has_bias else None)

    def add_low_rank_operators(self, rank: int) -> None:
        """Make nothing: the layer's own operator serves."""

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return h Aᵀ."""
        return self.dense(h, as_type(a, dtype))

    def widen(self, low: Tensor, b: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return low Bᵀ."""
        return self.dense(low, as_type(b, dtype))
