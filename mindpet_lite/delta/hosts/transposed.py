"""GPT-2's linear layer, Hugging Face's `Conv1D`, as a host: its weight lies as (inputs, outputs).

MindSpore has no such layer; mindone and other libraries have each their own class of that name. None is imported here:
a layer is known by its name and its Parameters, and adapted as one of the class below.
"""
from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.base import type_refusal
from mindpet_lite.delta.hosts.base import override_refusal
from mindpet_lite.delta.hosts.rows import TurnedHost
from mindpet_lite.delta.parts import from_rows, to_rows


class Conv1D(nn.Cell):
    r"""y = x W + b, with W as (inputs, outputs).

    Args:
        nf: number of outputs.
        nx: number of inputs.

    Inputs:
        - **x** (Tensor): `(*, nx)`.

    Outputs:
        Tensor `(*, nf)`.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), whose code calls a linear
    layer a convolution of width 1.
    """

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = Parameter(Tensor(np.random.normal(0, 0.02, (nx, nf)).astype(np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(nf, np.float32)), name="bias")
        self.matmul = ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        """Return x W + b."""
        return from_rows(self.matmul(to_rows(x, x.shape), self.weight) + self.bias, x.shape, self.nf)


class TransposedHost(TurnedHost, Conv1D):
    """`Conv1D` with the dtype rule."""

    plain_type, plain_name = Conv1D, "GPT-2's Conv1D"
    lies_turned = True

    @classmethod
    def matches(cls, cell: nn.Cell) -> bool:
        """Tell whether a cell is our `Conv1D`, or a library's own.

        That is a class of this very name, without cells in it, whose Parameters are a `weight` (inputs, outputs) and a
        `bias` (outputs,), and whose `nf` or `n_out` is the number of outputs.
        """
        return super().matches(cell) or _is_librarys(cell)

    @classmethod
    def refusal(cls, cell: nn.Cell, method: str) -> str | None:
        """Return why `cell` cannot be adapted; what a library's class computes is taken from its name."""
        plain = type(cell) if _is_librarys(cell) else Conv1D
        return override_refusal(cell, plain, cls.plain_name, method) or type_refusal(cell.weight, method)

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        super()._take_parts(layer, source)
        layer.nf = layer.out_channels


def _is_librarys(cell: nn.Cell) -> bool:
    if type(cell).__name__ != "Conv1D" or isinstance(cell, Conv1D) or any(True for _ in cell.cells()):
        return False
    own = dict(cell.parameters_and_names(expand=False))
    if set(own) != {"weight", "bias"} or own["weight"].ndim != 2:
        return False
    outputs = own["weight"].shape[1]
    return own["bias"].shape == (outputs,) and outputs in (getattr(cell, "nf", None), getattr(cell, "n_out", None))
