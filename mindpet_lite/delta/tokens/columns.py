"""Layers over a vocabulary whose weight is the table of an embedding (tied weights), with the rows that train."""
from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpet_lite.delta.hosts import as_running, take_types
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.hosts.linear import LinearHost
from mindpet_lite.delta.parts import as_type
from mindpet_lite.delta.tokens.rows import WithRows


class TokenColumns(WithRows):
    """A layer over the vocabulary whose weight is the table of an embedding with trained tokens: the rows are shared.

    y = x Tᵀ + b, and x (D - T)ᵀ more at the outputs of the tokens, times the strength. It equals the plain layer
    bit for bit at the start and while switched off.
    """

    _plain: tuple[nn.Cell, ...] = ()
    weight: Parameter
    token_ids: Tensor
    vocabulary: Tensor

    def _take(self, first: WithRows, plain: nn.Cell) -> None:
        self._follow(first)
        self._plain = (plain,)
        self.token_ids = Tensor(np.array(self.token_indices, np.int32)[:, None])
        self.vocabulary = Tensor(np.arange(self.weight.shape[0], dtype=np.int32))

    def _change(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what the trained tokens add to the output for the input `x` of type `dtype`."""
        rows = ops.gather(self.weight, self.token_ids[:, 0], 0)
        change = as_type(self.trained_rows - rows, dtype) * as_type(self.scaling, dtype)
        # Products with 0 and 1 again: each token's column goes to its place.
        places = as_type(ops.equal(self.token_ids, self.vocabulary), dtype)
        return ops.matmul(ops.matmul(x, ops.transpose(change, (1, 0))), places)

    def plain_cell(self) -> nn.Cell:
        """Return the layer that this one is on."""
        return as_running(self._plain[0], self)  # type: ignore[arg-type]


class TokenDense(TokenColumns, DenseHost):
    """`nn.Dense` on the table of trained tokens; see `TokenColumns`."""

    @classmethod
    def after(cls, first: WithRows, plain: nn.Dense) -> TokenDense:
        """Return the layer on the Parameter objects of `plain`, with the rows of the first."""
        layer = cls.on(cls, plain)
        layer._take(first, plain)
        take_types(layer, plain)
        return layer

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the plain layer's outputs and what the trained tokens add."""
        return self.biased(self.matmul(h, weight), dtype) + self._change(h, dtype)


class TokenLinear(TokenColumns, LinearHost):
    """`mint.nn.Linear` on the table of trained tokens; see `TokenColumns`."""

    @classmethod
    def after(cls, first: WithRows, plain: mint.nn.Linear) -> TokenLinear:
        """Return the layer on the Parameter objects of `plain`, with the rows of the first."""
        layer = cls.on(cls, plain)
        layer._take(first, plain)
        take_types(layer, plain)
        return layer

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the plain layer's outputs and what the trained tokens add."""
        bias = as_type(self.bias, dtype) if self.has_bias else None
        return self.dense(h, weight, bias) + self._change(h, dtype)
