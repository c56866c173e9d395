"""Layers whose weight is turned by an orthogonal matrix of blocks: what OFT and BOFT share.

The matrix is R = M(m) ... M(1), each M(i) of small blocks on its diagonal, from the second on between two butterfly
permutations. A layer computes with the differences M(i) - I: they are zero where the blocks are I, so that the layer
then is its base, exactly.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.delta.adapted import Method
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.parts import as_type


class Rotated(Method):
    """y = finish(W Rᵀ h + b): the weights of each output, a kernel's as one row, are turned by R.

    A dense layer turns its inputs instead, which is the same: W Rᵀ h = W (Rᵀ h). So the frozen weight stays as it is,
    and training needs no gradient of its size. A convolution turns its kernels, because one input is in many places of
    them. A table turns the rows that are looked up.

    A subclass writes `differences` in operators, and `merged` in numbers by way of `turned_weight`.
    """

    @classmethod
    def width(cls, layer: nn.Cell) -> int:
        """Return the number of rows and columns of R.

        Raises:
            ValueError: a convolution has groups, each with inputs of its own.
        """
        groups = cls.group_count(layer)
        if groups > 1:
            raise ValueError(f"the kernels of a convolution with {groups} groups see {groups} different parts of the "
                             f"input, which one rotation cannot turn; leave it out with exclude_modules.")
        shape = cls.logical_shape(layer)
        return shape[1] if cls.takes_ids else math.prod(shape[1:])

    def add_rotation(self, blocks: int, size: int, stages: int, dropout: float) -> None:
        """Make operators and constants.

        Args:
            blocks: how many blocks there are in all stages.
            size: of a block.
            stages: how many factors R has.
            dropout: the probability with which a block is I in a call in training.
        """
        self.stages = stages
        self.identity = Tensor(np.eye(size, dtype=np.float32))
        # Of the operators that invert, the one whose documentation lists Ascend and CPU and that is no experiment.
        self.solve = ops.MatrixSolve()
        self.product, self.product_back = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.has_dropout = dropout > 0
        if self.has_dropout:
            self.block_dropout, self.all_blocks = delta_dropout(dropout), Tensor(np.ones((blocks, 1, 1), np.float32))

    def differences(self) -> Tensor:
        """Return the blocks of all stages less I, (blocks, size, size), in float32."""
        raise NotImplementedError

    def cayley(self, skew: Tensor) -> Tensor:
        """Return (I - Q) (I + Q)⁻¹ - I = -2 (I + Q)⁻¹ Q of each skew-symmetric Q."""
        return self.solve(skew + self.identity, skew * -2.0)

    def changes(self, dtype: mindspore.dtype) -> tuple[Tensor, ...]:
        """Return the differences of each stage, at the strength."""
        found = self.differences() * self.scaling
        if self.has_dropout and self.training:
            # Blocks are there or not; what is there is not scaled up.
            found = found * as_type(self.block_dropout(self.all_blocks) > 0, mindspore.float32)
        found = as_type(found, dtype)
        if self.stages == 1:
            return (found,)
        return ops.split(found, found.shape[0] // self.stages)

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the output with inputs, kernels or rows turned."""
        return self.rotated(h, again, dtype)

    def rotated(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the same; a subclass that adds to it calls this, because a graph does not find `super().adapted`."""
        if self.dims:
            weight = as_type(self.logical_weight(), mindspore.float32)
            rows = ops.reshape(weight, (weight.shape[0], -1))
            rows = turned(rows, rows, self.changes(mindspore.float32), self.product_back, True)
            return self.affine(again, self.laid_out(as_type(ops.reshape(rows, weight.shape), dtype)), dtype)
        changes, weight = self.changes(dtype), self.own_weight(dtype)
        if self.takes_ids:
            rows = self.affine(h, weight, dtype)
            return turned(rows, rows, changes, self.product, False)
        width = h.shape[-1]
        rows = turned(ops.reshape(h, (-1, width)), ops.reshape(again, (-1, width)), changes, self.product, False)
        return self.affine(ops.reshape(rows, h.shape), weight, dtype)

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return which settings of a file are not this layer's; dropout may differ."""
        return super().unlike({name: value for name, value in settings.items() if not name.endswith("dropout")})


def turned(rows: Any, again: Any, changes: Sequence[Any], product: Callable[[Any, Any], Any], back: bool) -> Any:
    """Return rows R or rows Rᵀ, of Tensors or of numpy's arrays.

    Args:
        rows: (n, width).
        again: the same, for the products.
        changes: M(i) - I by blocks, (count, size, size) for each i; count 1 stands for blocks that are all the same.
        product: of batches of matrices; with `back` the second is transposed.
        back: whether it is Rᵀ.
    """
    last = len(changes) - 1
    for step in range(last + 1):
        stage = step if back else last - step
        rows = rows + _by_blocks(again, changes[stage], stage, product)
        again = rows
    return rows


def _by_blocks(rows: Any, blocks: Any, stage: int, product: Callable[[Any, Any], Any]) -> Any:
    """Return the rows times a matrix of blocks, its rows and columns permuted as in this stage of a butterfly.

    In stage i each run of 2^(i+1) half blocks is in another order: first those with even numbers, then those with odd.
    """
    count, size = blocks.shape[0], blocks.shape[2]
    length, width = rows.shape
    if count == 1:
        return product(rows.reshape((1, length * width // size, size)), blocks).reshape((length, width))
    if stage == 0:
        parts = rows.reshape((length, count, size)).transpose((1, 0, 2))
        return product(parts, blocks).transpose((1, 0, 2)).reshape((length, width))
    pairs, half = 2 ** stage, size // 2
    parts = rows.reshape((length, count // pairs, 2, pairs, half)).transpose((1, 3, 0, 2, 4))
    parts = product(parts.reshape((count, length, size)), blocks).reshape((count // pairs, pairs, length, 2, half))
    return parts.transpose((2, 0, 3, 1, 4)).reshape((length, width))


def turned_weight(weight: np.ndarray, changes: Sequence[np.ndarray], is_table: bool = False) -> np.ndarray:
    """Return W Rᵀ, of a table W R."""
    rows = weight.reshape(len(weight), -1)
    product = np.matmul if is_table else _product_back
    turned_rows: np.ndarray = turned(rows, rows, changes, product, not is_table)
    return turned_rows.reshape(weight.shape)


def _product_back(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left @ right.swapaxes(-1, -2)


def cayley_numbers(skew: np.ndarray) -> np.ndarray:
    """Return (I - Q) (I + Q)⁻¹ - I of each skew-symmetric Q."""
    return np.linalg.solve(skew + np.eye(skew.shape[-1], dtype=skew.dtype), -2 * skew)
