"""LowRank adapter, of Compacter: Efficient Low-Rank Hypercomplex Adapter Layers.

Karimi Mahabadi et al., 2021, https://arxiv.org/abs/2106.04647.

    y = x + s · (act(x Ld Rd + bd) Lu Ru + bu)             (the baseline LowRank: each weight is a product L R)
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer

from mindpet_lite.arguments import check_bool, check_int
from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.base import Delta, check_float_type
from mindpet_lite.delta.bottleneck import Bottleneck, BottleneckLayer, BottleneckSettings, Strategy
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.dense import AdaptedDense, OutputConfig, dense_refusal
from mindpet_lite.delta.hosts import DenseHost, Host, TypedCell
from mindpet_lite.delta.parts import as_type, check_init, check_strategies, from_rows, initial, set_strategies, to_rows

LEFT, RIGHT = "mindpet_delta_low_rank_adapter_weight_left", "mindpet_delta_low_rank_adapter_weight_right"


class LowRankLinear(TypedCell, Delta):
    r"""A linear layer whose weight is a product of two low-rank factors.

    $$
    y = x L R + b
    $$

    computed as (x L) R: the product L R is never made. `mindpet_delta_low_rank_adapter_weight_left`
    (in_channels, rank) is L, `mindpet_delta_low_rank_adapter_weight_right` (rank, out_channels) is R, and `bias`
    (out_channels,) is b. Placed by hand, ``freeze_delta(net, "low_rank_adapter")`` leaves L and R trainable, by their
    names; name the bias in `exclude` if it is to train too.

    Dtype rule: as `LowRankAdapterLayer`.

    Source: Karimi Mahabadi et al., https://arxiv.org/abs/2106.04647, the baseline LowRank.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        rank (int): of the weight; positive. Default: 1.
        weight_init (str | Initializer | number): start of both factors. Default: "normal".
        bias_init (Tensor | str | Initializer | number): start of the bias. Default: "zeros".
        has_bias (bool): whether there is a bias. Default: True.
        param_init_type (mindspore.dtype): type of the parameters: float16, bfloat16 or float32. Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)`, of the type that the dtype rule says.

    Raises:
        TypeError: a size is a bool or no int; has_bias is no bool; a type is not float16, bfloat16 or float32; an
            initialiser is of no known kind.
        ValueError: a size is not positive; an initialiser's name is unknown or a Tensor has the wrong shape.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.LowRankLinear(4, 8, rank=2)
        >>> layer(Tensor(np.ones((3, 4), np.float32))).shape
        (3, 8)
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
        """Apply the layer to `x` (*, in_channels); return (*, out_channels)."""
        shape, output_type, dtype = x.shape, self._output_type(x), self._compute_type()
        x = to_rows(self._entered(x, dtype), shape)
        y = self.affine(x, as_type(self.bias, dtype)) if self.has_bias else self.product(x)
        return as_type(from_rows(y, shape, self.out_channels), output_type)

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
        """Return the strategies for `shard` with their operators; `which` is part of the arguments' names."""
        names = f"strategy_matmul{which}_weight", f"strategy_matmul{which}_input"
        check_strategies(dict(zip(names, (weight, entry))))
        for name, strategy in zip(names, (weight, entry)):
            if strategy is not None and ([len(part) for part in strategy] != [2, 2]
                                         or strategy[0][1] != strategy[1][0]):
                raise ValueError(f"{name} must split the two axes of both inputs of a product, the inner axis alike, "
                                 f"such as ((2, 4), (4, 1)), but got {strategy!r:.100}.")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankAdapterSettings(BottleneckSettings):
    """The settings of a low-rank adapter, checked when made; see `LowRankAdapterLayer`."""

    reduction_factor: int = 1
    low_rank_size: int = 1
    low_rank_w_init: Any = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction_factor", "low_rank_size"):
            check_int(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))
        if not isinstance(self.low_rank_w_init, (str, Initializer)):
            raise TypeError(f"low_rank_w_init must be an initialiser or its name, but got "
                            f"{self.low_rank_w_init!r:.100} of type {type(self.low_rank_w_init).__name__}.")
        check_init("low_rank_w_init", self.low_rank_w_init)


class LowRankAdapterLayer(BottleneckLayer):
    r"""An adapter both of whose weights are products of two low-rank factors, to be put after a sub-layer of a net.

    $$
    y = x + s (act(x L_d R_d + b_d) L_u R_u + b_u)
    $$

    `mindpet_delta_low_rank_adapter_down_sampler` and `mindpet_delta_low_rank_adapter_up_sampler` are
    `LowRankLinear`, from hidden_size to hidden_size // reduction_factor and back, with
    `mindpet_delta_low_rank_adapter_non_linear` between them. `scaling` () is s, a Parameter that is never
    trained: it is one so that it can change in a compiled graph
    (`mindpet_lite.set_lora_scale`, `mindpet_lite.adapters_disabled`).

    R_u starts at zero and the other factors by `low_rank_w_init`, so the layer starts as the identity, exactly.
    (MindPet starts R_u by `low_rank_w_init` too, and so from another function than the base; that is a deliberate
    difference.)

    Dtype rule: parameters keep their type. `to_float(t)` means what it means in MindSpore: the input counts as one of
    type t, and the output has type t. Without it the output has the type of the input. The delta is computed in
    `compute_dtype` if given, else in t, else in the type of the parameters; the sum in the type of the output. (MindPet
    computes in float16 unless told otherwise; that is a deliberate difference too.)

    Source: Karimi Mahabadi et al., https://arxiv.org/abs/2106.04647, the baseline LowRank.

    Args:
        hidden_size (int): size of the last axis of the input; positive.
        reduction_factor (int): hidden_size by the size of the bottleneck, which is rounded down; from 1 to hidden_size.
        low_rank_size (int): rank of the two weights; positive. Default: 1.
        low_rank_w_init (str | Initializer): start of the factors. Default: "xavier_uniform".
        non_linearity (str): as for `AdapterLayer`. Default: "gelu".
        param_init_type (mindspore.dtype): type of the parameters: float16, bfloat16 or float32. Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.

    Inputs:
        - **x** (Tensor): `(*, hidden_size)`, any number of leading axes, none included.

    Outputs:
        Tensor of the shape of `x`, and of the type that the dtype rule says.

    Raises:
        TypeError: a size is a bool or no int; the non-linearity is unknown; low_rank_w_init is no initialiser or name;
            a type is not float16, bfloat16 or float32.
        ValueError: a size is not positive; reduction_factor is above hidden_size; the initialiser's name is unknown.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer, x = mp.LowRankAdapterLayer(8, reduction_factor=4), Tensor(np.ones((3, 8), np.float32))
        >>> bool((layer(x) == x).all())            # it starts as the identity
        True
    """

    method: ClassVar[str] = "low_rank_adapter"
    delta_names = ("mindpet_delta_low_rank_adapter_down_sampler", "mindpet_delta_low_rank_adapter_non_linear",
                   "mindpet_delta_low_rank_adapter_up_sampler")

    def __init__(self, hidden_size: int, reduction_factor: int, low_rank_size: int = 1,
                 low_rank_w_init: Any = "xavier_uniform", non_linearity: str = "gelu",
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None) -> None:
        check_int("hidden_size", hidden_size)
        settings = LowRankAdapterSettings(reduction_factor=reduction_factor, low_rank_size=low_rank_size,
                                          low_rank_w_init=low_rank_w_init, non_linearity=non_linearity,
                                          param_init_type=param_init_type, compute_dtype=compute_dtype)
        if reduction_factor > hidden_size:
            raise ValueError(f"reduction_factor must be at most hidden_size {hidden_size}, or no bottleneck is left, "
                             f"but got {reduction_factor}.")
        hidden_size, low_rank_size = int(hidden_size), settings.low_rank_size
        super().__init__(hidden_size, hidden_size // settings.reduction_factor, settings)
        self.reduction_factor, self.low_rank_size = settings.reduction_factor, low_rank_size
        common = {"rank": low_rank_size, "weight_init": low_rank_w_init, "param_init_type": param_init_type}
        self.mindpet_delta_low_rank_adapter_down_sampler = LowRankLinear(hidden_size, self.bottleneck_size, **common)
        self.mindpet_delta_low_rank_adapter_non_linear = self.activation_of(settings)
        up = LowRankLinear(self.bottleneck_size, hidden_size, **common)
        up.mindpet_delta_low_rank_adapter_weight_right.set_data(
            initial("low_rank_w_init", "zeros", (low_rank_size, hidden_size), param_init_type))
        self.mindpet_delta_low_rank_adapter_up_sampler = up

    def _parts(self) -> tuple[nn.Cell, nn.Cell, nn.Cell]:
        return (self.mindpet_delta_low_rank_adapter_down_sampler, self.mindpet_delta_low_rank_adapter_non_linear,
                self.mindpet_delta_low_rank_adapter_up_sampler)

    def _own_type(self) -> mindspore.dtype:
        return self.mindpet_delta_low_rank_adapter_down_sampler._own_type()

    def settings(self) -> dict[str, Any]:
        """Return reduction_factor, low_rank_size and non_linearity."""
        return {"reduction_factor": self.reduction_factor, "low_rank_size": self.low_rank_size,
                "non_linearity": self.non_linearity}

    def shard(self, strategy_matmul_down_sampler_weight: tuple | None = None,
              strategy_matmul_down_sampler_input: tuple | None = None,
              strategy_bias_down_sampler: tuple | None = None, strategy_non_linearity: tuple | None = None,
              strategy_matmul_up_sampler_weight: tuple | None = None,
              strategy_matmul_up_sampler_input: tuple | None = None, strategy_bias_up_sampler: tuple | None = None,
              strategy_residual_add: tuple | None = None) -> LowRankAdapterLayer:
        """Set how the operators are split in (semi-)auto-parallel training; each strategy is optional.

        A strategy is a tuple with a tuple of ints for every input of its operator, as `Primitive.shard` takes it; for
        the products see `LowRankLinear.shard`. All are checked before the first is set.

        Raises:
            TypeError: a strategy is no tuple of tuples of ints.
            ValueError: a product's strategy does not fit a matrix product; or the non-linearity is LogSoftmax, or not
                made of one operator: split that yourself.
        """
        set_strategies(self._strategies(
            (strategy_matmul_down_sampler_weight, strategy_matmul_down_sampler_input, strategy_bias_down_sampler),
            strategy_non_linearity,
            (strategy_matmul_up_sampler_weight, strategy_matmul_up_sampler_input, strategy_bias_up_sampler),
            strategy_residual_add))
        return self

    def _strategies(self, down: tuple, non_linearity: tuple | None, up: tuple,
                    residual: tuple | None) -> list[Strategy]:
        return [*self.mindpet_delta_low_rank_adapter_down_sampler.strategies("_down_sampler", *down),
                *self.mindpet_delta_low_rank_adapter_up_sampler.strategies("_up_sampler", *up),
                *self.inner_strategies(non_linearity, up[-1], residual)]


class LowRankAdapter(Bottleneck):
    """A linear layer with a `LowRankAdapterLayer` behind its activation; see `LowRankAdapterDense`."""

    method: ClassVar[str] = "low_rank_adapter"
    delta_names = ("mindpet_delta_low_rank_adapter",)

    def _add_delta(self, config: LowRankAdapterSettings) -> None:
        self._attach(LowRankAdapterLayer(self.outputs(self), config.reduction_factor, config.low_rank_size,
                                         config.low_rank_w_init, config.non_linearity, config.param_init_type,
                                         config.compute_dtype))


class LowRankAdapterDense(LowRankAdapter, AdaptedDense):
    r"""A Dense layer with a low-rank adapter behind its activation.

    $$
    h = act(x W^T + b), y = h + s (act_a(h L_d R_d + b_d) L_u R_u + b_u)
    $$

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them;
    `mindpet_delta_low_rank_adapter` is the `LowRankAdapterLayer`, and `scaling` () its scaling s.
    The layer starts equal to its base, exactly. For the dtype rule see `LowRankAdapterLayer`; without
    `compute_dtype` and `to_float()` the whole layer computes in the type of `weight`.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        weight_init (Tensor | str | Initializer | number): start of `weight`. Default: "normal".
        bias_init (Tensor | str | Initializer | number): start of `bias`. Default: "zeros".
        has_bias (bool): whether there is a `bias`. Default: True.
        activation (str | Cell | Primitive | None): activation of the Dense, before the adapter. Default: None.
        reduction_factor (int): out_channels by the size of the bottleneck; from 1 to out_channels. Default: 1.
        low_rank_size (int): as for `LowRankAdapterLayer`; positive. Default: 1.
        low_rank_w_init (str | Initializer): as for `LowRankAdapterLayer`. Default: "xavier_uniform".
        non_linearity (str): as for `LowRankAdapterLayer`. Default: "gelu".
        param_init_type (mindspore.dtype): type of the adapter's parameters: float16, bfloat16 or float32.
            Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.
        dtype (mindspore.dtype): type of `weight` and `bias`. Default: float32.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)`, of the type that the dtype rule says.

    Raises:
        TypeError: as `LowRankAdapterLayer`; `activation` or an initialiser is of no known kind.
        ValueError: as `LowRankAdapterLayer`; an initial Tensor has the wrong shape; the activation's (a
            KeyError too) or initialiser's name is unknown.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.LowRankAdapterDense(4, 8, reduction_factor=4)
        >>> layer(Tensor(np.ones((3, 4), np.float32))).shape
        (3, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, weight_init: Any = "normal", bias_init: Any = "zeros",
                 has_bias: bool = True, activation: Any = None, reduction_factor: int = 1, low_rank_size: int = 1,
                 low_rank_w_init: Any = "xavier_uniform", non_linearity: str = "gelu",
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, *, dtype: mindspore.dtype = mindspore.float32) -> None:
        settings = LowRankAdapterSettings(reduction_factor=reduction_factor, low_rank_size=low_rank_size,
                                          low_rank_w_init=low_rank_w_init, non_linearity=non_linearity,
                                          param_init_type=param_init_type, compute_dtype=compute_dtype)
        super().__init__(in_channels, out_channels, weight_init=weight_init, bias_init=bias_init, has_bias=has_bias,
                         activation=activation, dtype=dtype)
        self._add_delta(settings)

    @classmethod
    def from_dense(cls, dense: nn.Dense, reduction_factor: int = 1, low_rank_size: int = 1,
                   low_rank_w_init: Any = "xavier_uniform", non_linearity: str = "gelu",
                   param_init_type: mindspore.dtype = mindspore.float32,
                   compute_dtype: mindspore.dtype | None = None) -> LowRankAdapterDense:
        """Adapt an existing Dense: same Parameter objects and names, same primitives, same activation.

        `dense` itself stays as it is; put the returned layer in its place. The output is that of `dense`, bit for bit.
        The arguments are those of the class.

        Raises:
            TypeError: `dense` is no nn.Dense, is adapted already, or overrides `construct`; or as the class.
            ValueError: as the class.
        """
        reason = dense_refusal(dense, "a low-rank adapter")
        if reason:
            raise TypeError(reason)
        return cls._on(dense, LowRankAdapterSettings(
            reduction_factor=reduction_factor, low_rank_size=low_rank_size, low_rank_w_init=low_rank_w_init,
            non_linearity=non_linearity, param_init_type=param_init_type, compute_dtype=compute_dtype))

    def shard(self, strategy_matmul_org: tuple | None = None, strategy_bias_org: tuple | None = None,
              strategy_activation_org: tuple | None = None,
              strategy_matmul_down_sampler_weight: tuple | None = None,
              strategy_matmul_down_sampler_input: tuple | None = None,
              strategy_bias_down_sampler: tuple | None = None, strategy_non_linearity: tuple | None = None,
              strategy_matmul_up_sampler_weight: tuple | None = None,
              strategy_matmul_up_sampler_input: tuple | None = None, strategy_bias_up_sampler: tuple | None = None,
              strategy_residual_add: tuple | None = None) -> LowRankAdapterDense:
        """Set how the operators are split: the Dense's by `..._org`, others as `LowRankAdapterLayer.shard`.

        What the layer lacks (bias, activation) has nothing to split.

        Raises:
            TypeError, ValueError: as `LowRankAdapterLayer.shard`.
        """
        set_strategies([*self.strategies(strategy_matmul_org, strategy_bias_org, strategy_activation_org),
                        *self.mindpet_delta_low_rank_adapter._strategies(
                            (strategy_matmul_down_sampler_weight, strategy_matmul_down_sampler_input,
                             strategy_bias_down_sampler), strategy_non_linearity,
                            (strategy_matmul_up_sampler_weight, strategy_matmul_up_sampler_input,
                             strategy_bias_up_sampler), strategy_residual_add)])
        return self


@dataclasses.dataclass(frozen=True)
class LowRankAdapterConfig(OutputConfig, LowRankAdapterSettings):
    """Settings of the low-rank adapter; the fields are those of `LowRankAdapterDense` and `DeltaConfig`.

    Args:
        reduction_factor: a layer's outputs by the size of the bottleneck, which is rounded down; from 1 to the outputs.
            Default: 1.
        low_rank_size: rank of the two weights; positive. Default: 1.
        low_rank_w_init: start of the factors but the last, which starts at zero: an Initializer or its name.
            Default: "xavier_uniform".
        non_linearity: name of the activation in the bottleneck, one of `mindpet_lite.delta.activation.get_activation`;
            "softmax2d" works across the axes of the input, which must then have 3 or 4. Default: "gelu".
        param_init_type: type of what trains: float16, bfloat16 or float32. Default: float32.
        compute_dtype: type that the adapter computes in: float16, bfloat16 or float32. None: the type of `to_float()`,
            else that of its parameters or the weight. Default: None.

    Raises:
        TypeError, ValueError: as `LowRankAdapterDense`.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LowRankAdapterConfig(reduction_factor=4, target_modules=["0"]))
        >>> sum(item.size for item in net.trainable_params())
        30
    """

    pet_type: ClassVar[str] = "low_rank_adapter"
    layer: ClassVar[type[Adapted]] = LowRankAdapter
    by_hand: ClassVar[Mapping[type[Host] | None, type[Adapted]]] = {DenseHost: LowRankAdapterDense}
    title: ClassVar[str] = "a low-rank adapter"

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        LowRankAdapterSettings.__post_init__(self)

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the two maps' factors and biases."""
        width, rank = self.class_for(cell).outputs(cell), self.low_rank_size
        size = width // self.reduction_factor
        found: dict[str, tuple[int, ...]] = {}
        for which, inputs, outputs in (("down", width, size), ("up", size, width)):
            name = f"mindpet_delta_low_rank_adapter.mindpet_delta_low_rank_adapter_{which}_sampler"
            found.update({f"{name}.{LEFT}": (inputs, rank), f"{name}.{RIGHT}": (rank, outputs),
                          f"{name}.bias": (outputs,)})
        return found
