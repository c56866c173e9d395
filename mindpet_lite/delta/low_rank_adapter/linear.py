"""A linear layer whose weight is a product of two low-rank factors."""
from __future__ import annotations

from typing import Any, ClassVar

import mindspore
from mindspore import Parameter, Tensor, ops

from mindpet_lite.delta.base import Delta, check_bool, check_float_type, check_int
from mindpet_lite.delta.bottleneck import Strategy
from mindpet_lite.delta.dense import TypedCell
from mindpet_lite.delta.parts import as_type, check_init, check_strategies, initial, set_strategies

LEFT, RIGHT = "mindpet_delta_low_rank_adapter_weight_left", "mindpet_delta_low_rank_adapter_weight_right"


class LowRankLinear(TypedCell, Delta):
    r"""A linear layer whose weight is a product of two low-rank factors.

    .. math:: y = x L R + b

    computed as (x L) R: the product L R is never made. `mindpet_delta_low_rank_adapter_weight_left`
    (in_channels, rank) is L, `mindpet_delta_low_rank_adapter_weight_right` (rank, out_channels) is R, and `bias`
    (out_channels,) is b. Placed by hand, ``freeze_delta(net, "low_rank_adapter")`` leaves L and R trainable, by their
    names; name the bias in `exclude` if it is to train too.

    Dtype rule: as :class:`LowRankAdapterLayer`.

    Source: Karimi Mahabadi et al., https://arxiv.org/abs/2106.04647, the baseline LowRank.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        rank (int): of the weight; positive.
        weight_init (str | Initializer | number): start of both factors.
        bias_init (Tensor | str | Initializer | number): start of the bias.
        has_bias (bool): whether there is a bias.
        param_init_type (mindspore.dtype): type of the parameters: float16, bfloat16 or float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)` of the type of `x`.

    Raises:
        TypeError: a size is a bool or no int; has_bias is no bool; a type is not float16, bfloat16 or float32; an
            initialiser is of no known kind.
        ValueError: a size is not positive; an initialiser's name is unknown or a Tensor has the wrong shape.
    """

    method: ClassVar[str] = "low_rank_adapter"
    fixed = "a LowRankLinear is the layer itself, so there is no base beneath it to scale towards or to fall back to."
    unmergeable = "a LowRankLinear is the layer itself, so there is no weight beneath it to merge into."

    def __init__(self, in_channels: int, out_channels: int, rank: int = 1, weight_init: Any = "normal",
                 bias_init: Any = "zeros", has_bias: bool = True, param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None) -> None:
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels), ("rank", rank)):
            check_int(name, size)
        check_bool("has_bias", has_bias)
        check_float_type("param_init_type", param_init_type)
        if compute_dtype is not None:
            check_float_type("compute_dtype", compute_dtype)
        check_init("weight_init", weight_init)
        check_init("bias_init", bias_init)
        super().__init__()
        in_channels, out_channels, rank = int(in_channels), int(out_channels), int(rank)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.has_bias, self.compute_dtype = has_bias, compute_dtype
        self.mindpet_delta_low_rank_adapter_weight_left = Parameter(
            initial("weight_init", weight_init, (in_channels, rank), param_init_type), name=LEFT)
        self.mindpet_delta_low_rank_adapter_weight_right = Parameter(
            initial("weight_init", weight_init, (rank, out_channels), param_init_type), name=RIGHT)
        self.bias = None
        self.delta_names = (LEFT, RIGHT)
        if has_bias:
            self.bias = Parameter(initial("bias_init", bias_init, (out_channels,), param_init_type), name="bias")
            self.bias_add = ops.BiasAdd()
            self.delta_names = (LEFT, RIGHT, "bias")
        # MindPet's names: the first takes the input, the second what is left of the weight.
        self.matmul_input = ops.MatMul()
        self.matmul_weight = ops.MatMul()
        self.reshape = ops.Reshape()

    def _own_type(self) -> mindspore.dtype:
        return self.mindpet_delta_low_rank_adapter_weight_left.dtype

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, in_channels); return (*, out_channels) of the type of `x`."""
        shape, input_type, dtype = x.shape, x.dtype, self._compute_type()
        x = as_type(x, dtype)
        if len(shape) != 2:
            x = self.reshape(x, (-1, shape[-1]))
        y = self.affine(x, as_type(self.bias, dtype)) if self.has_bias else self.product(x)
        if len(shape) != 2:
            y = self.reshape(y, shape[:-1] + (self.out_channels,))
        return as_type(y, input_type)

    def product(self, x: Tensor) -> Tensor:
        """Return x L R for rows `x`, in their type."""
        low = self.matmul_input(x, as_type(self.mindpet_delta_low_rank_adapter_weight_left, x.dtype))
        return self.matmul_weight(low, as_type(self.mindpet_delta_low_rank_adapter_weight_right, x.dtype))

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return x L R + bias for rows `x`, in their type."""
        return self.bias_add(self.product(x), bias)

    def shard(self, strategy_matmul_weight: tuple | None = None, strategy_matmul_input: tuple | None = None,
              strategy_bias: tuple | None = None) -> LowRankLinear:
        """Set how the operators are split in (semi-)auto-parallel training; each strategy is optional.

        The strategies are those of MindPet's two products: ``((in, rank), (rank, out))`` for L R, and
        ``((rows, in), (in, out))`` for the input and that. Made as (x L) R, the first product is split by
        ``((rows, in), (in, rank))`` and the second by ``((rows, rank), (rank, out))``; rows, in and out are those of
        `strategy_matmul_input` where it is given.

        Raises:
            TypeError: a strategy is no tuple of tuples of ints.
            ValueError: a product's strategy does not fit a matrix product.
        """
        set_strategies(self.strategies("", strategy_matmul_weight, strategy_matmul_input, strategy_bias))
        return self

    def strategies(self, which: str, weight: tuple | None, entry: tuple | None, bias: tuple | None) -> list[Strategy]:
        """Return the strategies for :meth:`shard` with their operators; `which` is part of the arguments' names."""
        names = f"strategy_matmul{which}_weight", f"strategy_matmul{which}_input"
        check_strategies(dict(zip(names, (weight, entry))))
        for name, strategy in zip(names, (weight, entry)):
            if strategy is not None and ([len(part) for part in strategy] != [2, 2]
                                         or strategy[0][1] != strategy[1][0]):
                raise ValueError(f"{name} must split the two axes of both inputs of a product, the inner axis alike, "
                                 f"such as ((2, 4), (4, 1)), but got {strategy!r}.")
        left = right = None
        if weight is not None or entry is not None:
            (inner, rank), (_, outer) = weight or ((1, 1), (1, 1))
            (rows, inner), (_, outer) = entry or ((1, inner), (inner, outer))
            left, right = ((rows, inner), (inner, rank)), ((rows, rank), (rank, outer))
        return [(names[1], self.matmul_input, left), (names[0], self.matmul_weight, right),
                (f"strategy_bias{which}", self.bias_add if self.has_bias else None, bias)]

    def extend_repr(self) -> str:
        """Show the sizes."""
        return (f"input_channels={self.in_channels}, output_channels={self.out_channels}, rank={self.rank}, "
                f"has_bias={self.has_bias}")
