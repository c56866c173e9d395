"""Adapter: Parameter-Efficient Transfer Learning for NLP. Houlsby et al., 2019, https://arxiv.org/abs/1902.00751.

    y = x + s · (act(x Wdᵀ + bd) Wuᵀ + bu)                                               (section 2.1 and figure 2)
"""
from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
from mindspore import Tensor, nn

from mindpet_lite.arguments import check_int
from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.bottleneck import (
    HE_UNIFORM,
    Bottleneck,
    BottleneckLayer,
    BottleneckSettings,
    Strategy,
)
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.dense import AdaptedDense, OutputConfig, dense_refusal
from mindpet_lite.delta.hosts import DenseHost, Host
from mindpet_lite.delta.parts import as_type, initial, set_strategies


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings(BottleneckSettings):
    """The settings of an adapter, checked when made; see `AdapterLayer`."""

    bottleneck_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("bottleneck_size", self.bottleneck_size)
        object.__setattr__(self, "bottleneck_size", int(self.bottleneck_size))


class DenseSampler(nn.Dense):
    """One of an adapter's two maps: a Dense that computes in the type of what it gets."""

    def __init__(self, in_channels: int, out_channels: int, weight_init: Any, dtype: mindspore.dtype) -> None:
        super().__init__(in_channels, out_channels, initial("weight", weight_init, (out_channels, in_channels), dtype),
                         initial("bias", "zeros", (out_channels,), dtype), dtype=dtype)

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return x Wᵀ + bias for rows `x`, in their type."""
        return self.bias_add(self.matmul(x, as_type(self.weight, x.dtype)), bias)


class AdapterLayer(BottleneckLayer):
    r"""A residual bottleneck, to be put after a sub-layer of a net.

    $$
    y = x + s (act(x W_d^T + b_d) W_u^T + b_u)
    $$

    `mindpet_delta_adapter_block` holds `mindpet_delta_adapter_down_sampler` with `weight`
    (bottleneck_size, hidden_size) and `bias` (bottleneck_size,), `mindpet_delta_adapter_non_linear`, and
    `mindpet_delta_adapter_up_sampler` with `weight` (hidden_size, bottleneck_size) and `bias` (hidden_size,).
    `scaling` () is s, a Parameter that is never trained: it is one so that it can change in a
    compiled graph (`mindpet_lite.set_lora_scale`, `mindpet_lite.adapters_disabled`).

    The map up starts at zero and the map down He-uniform with negative slope √5, so the layer starts as the identity,
    exactly. (The paper starts both near zero, to come close to that.)

    Dtype rule: parameters keep their type. `to_float(t)` means what it means in MindSpore: the input counts as one of
    type t, and the output has type t. Without it the output has the type of the input. The delta is computed in
    `compute_dtype` if given, else in t, else in the type of the parameters; the sum in the type of the output. (MindPet
    computes in float16 unless told otherwise; that is a deliberate difference.)

    Source: Houlsby et al., https://arxiv.org/abs/1902.00751, section 2.1.

    Args:
        hidden_size (int): size of the last axis of the input; positive.
        bottleneck_size (int): size of the bottleneck; positive. Default: 64.
        non_linearity (str): name of the activation in the bottleneck, one of those of
            `mindpet_lite.delta.activation.get_activation`. `softmax2d` works across the axes of the input, which
            must then have 3 or 4; `prelu` trains a slope of its own; `rrelu` draws its slopes in training only.
            Default: "gelu".
        param_init_type (mindspore.dtype): type of the parameters: float16, bfloat16 or float32. Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.

    Inputs:
        - **x** (Tensor): `(*, hidden_size)`, any number of leading axes, none included.

    Outputs:
        Tensor of the shape of `x`, and of the type that the dtype rule says.

    Raises:
        TypeError: a size is a bool or no int; the non-linearity is unknown; a type is not float16, bfloat16 or float32.
        ValueError: a size is not positive.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer, x = mp.AdapterLayer(8, bottleneck_size=2), Tensor(np.ones((3, 8), np.float32))
        >>> bool((layer(x) == x).all())            # it starts as the identity
        True
    """

    method: ClassVar[str] = "adapter"
    delta_names = ("mindpet_delta_adapter_block",)

    def __init__(self, hidden_size: int, bottleneck_size: int = 64, non_linearity: str = "gelu",
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None) -> None:
        check_int("hidden_size", hidden_size)
        settings = AdapterSettings(bottleneck_size=bottleneck_size, non_linearity=non_linearity,
                                   param_init_type=param_init_type, compute_dtype=compute_dtype)
        hidden_size, bottleneck_size = int(hidden_size), settings.bottleneck_size
        super().__init__(hidden_size, bottleneck_size, settings)
        self.mindpet_delta_adapter_block = nn.SequentialCell(OrderedDict(
            mindpet_delta_adapter_down_sampler=DenseSampler(hidden_size, bottleneck_size, HE_UNIFORM, param_init_type),
            mindpet_delta_adapter_non_linear=self.activation_of(settings),
            mindpet_delta_adapter_up_sampler=DenseSampler(bottleneck_size, hidden_size, "zeros", param_init_type)))

    @property
    def non_linearity_name(self) -> str:
        """MindPet's name of `non_linearity`."""
        return self.non_linearity

    def _parts(self) -> tuple[nn.Cell, nn.Cell, nn.Cell]:
        block = self.mindpet_delta_adapter_block
        return (block.mindpet_delta_adapter_down_sampler, block.mindpet_delta_adapter_non_linear,
                block.mindpet_delta_adapter_up_sampler)

    def _own_type(self) -> mindspore.dtype:
        return self.mindpet_delta_adapter_block.mindpet_delta_adapter_down_sampler.weight.dtype

    def settings(self) -> dict[str, Any]:
        """Return bottleneck_size and non_linearity."""
        return {"bottleneck_size": self.bottleneck_size, "non_linearity": self.non_linearity}

    def shard(self, strategy_matmul_down_sampler: tuple | None = None,
              strategy_bias_down_sampler: tuple | None = None, strategy_non_linearity: tuple | None = None,
              strategy_matmul_up_sampler: tuple | None = None, strategy_bias_up_sampler: tuple | None = None,
              strategy_residual_add: tuple | None = None) -> AdapterLayer:
        """Set how the operators are split in (semi-)auto-parallel training; each strategy is optional.

        A strategy is a tuple with a tuple of ints for every input of its operator, as `Primitive.shard` takes it. All
        are checked before the first is set.

        Raises:
            TypeError: a strategy is no tuple of tuples of ints.
            ValueError: the non-linearity is LogSoftmax, or not made of one operator: split that yourself.
        """
        set_strategies(self._strategies(strategy_matmul_down_sampler, strategy_bias_down_sampler,
                                        strategy_non_linearity, strategy_matmul_up_sampler, strategy_bias_up_sampler,
                                        strategy_residual_add))
        return self

    def _strategies(self, matmul_down: tuple | None, bias_down: tuple | None, non_linearity: tuple | None,
                    matmul_up: tuple | None, bias_up: tuple | None, residual: tuple | None) -> list[Strategy]:
        down, _, up = self._parts()
        return [("strategy_matmul_down_sampler", down.matmul, matmul_down),
                ("strategy_bias_down_sampler", down.bias_add, bias_down),
                ("strategy_matmul_up_sampler", up.matmul, matmul_up),
                ("strategy_bias_up_sampler", up.bias_add, bias_up),
                *self.inner_strategies(non_linearity, bias_up, residual)]


class Adapter(Bottleneck):
    """A linear layer with an `AdapterLayer`, `mindpet_delta_adapter`, behind its activation; see `AdapterDense`."""

    method: ClassVar[str] = "adapter"
    delta_names = ("mindpet_delta_adapter",)

    def _add_delta(self, config: AdapterSettings) -> None:
        self._attach(AdapterLayer(self.outputs(self), config.bottleneck_size, config.non_linearity,
                                  config.param_init_type, config.compute_dtype))


class AdapterDense(Adapter, AdaptedDense):
    r"""A Dense layer with an adapter behind its activation.

    $$
    h = act(x W^T + b), y = h + s (act_a(h W_d^T + b_d) W_u^T + b_u)
    $$

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them;
    `mindpet_delta_adapter` is the `AdapterLayer`, and `scaling` () its scaling s. The layer starts
    equal to its base, exactly. For the dtype rule see `AdapterLayer`; without `compute_dtype` and `to_float()`
    the whole layer computes in the type of `weight`.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        weight_init (Tensor | str | Initializer | number): start of `weight`. Default: "normal".
        bias_init (Tensor | str | Initializer | number): start of `bias`. Default: "zeros".
        has_bias (bool): whether there is a `bias`. Default: True.
        activation (str | Cell | Primitive | None): activation of the Dense, before the adapter. Default: None.
        bottleneck_size (int): as for `AdapterLayer`; positive. Default: 64.
        non_linearity (str): as for `AdapterLayer`. Default: "gelu".
        param_init_type (mindspore.dtype): type of the adapter's parameters: float16, bfloat16 or float32.
            Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.
        dtype (mindspore.dtype): type of `weight` and `bias`. Default: float32.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)`, of the type that the dtype rule says.

    Raises:
        TypeError: as `AdapterLayer`; `activation` or an initialiser is of no known kind.
        ValueError: as `AdapterLayer`; an initial Tensor has the wrong shape; the activation's (a KeyError too)
            or initialiser's name is unknown.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.AdapterDense(4, 8, bottleneck_size=2)
        >>> layer(Tensor(np.ones((3, 4), np.float32))).shape
        (3, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, weight_init: Any = "normal", bias_init: Any = "zeros",
                 has_bias: bool = True, activation: Any = None, bottleneck_size: int = 64,
                 non_linearity: str = "gelu", param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, *, dtype: mindspore.dtype = mindspore.float32) -> None:
        settings = AdapterSettings(bottleneck_size=bottleneck_size, non_linearity=non_linearity,
                                   param_init_type=param_init_type, compute_dtype=compute_dtype)
        super().__init__(in_channels, out_channels, weight_init=weight_init, bias_init=bias_init, has_bias=has_bias,
                         activation=activation, dtype=dtype)
        self._add_delta(settings)

    @classmethod
    def from_dense(cls, dense: nn.Dense, bottleneck_size: int = 64, non_linearity: str = "gelu",
                   param_init_type: mindspore.dtype = mindspore.float32,
                   compute_dtype: mindspore.dtype | None = None) -> AdapterDense:
        """Adapt an existing Dense: same Parameter objects and names, same primitives, same activation.

        `dense` itself stays as it is; put the returned layer in its place. The output is that of `dense`, bit for bit.
        The arguments are those of the class.

        Raises:
            TypeError: `dense` is no nn.Dense, is adapted already, or overrides `construct`; or as the class.
            ValueError: as the class.
        """
        reason = dense_refusal(dense, "an adapter")
        if reason:
            raise TypeError(reason)
        return cls._on(dense, AdapterSettings(bottleneck_size=bottleneck_size, non_linearity=non_linearity,
                                              param_init_type=param_init_type, compute_dtype=compute_dtype))

    def shard(self, strategy_matmul_org: tuple | None = None, strategy_bias_org: tuple | None = None,
              strategy_activation_org: tuple | None = None, strategy_matmul_down_sampler: tuple | None = None,
              strategy_bias_down_sampler: tuple | None = None, strategy_non_linearity: tuple | None = None,
              strategy_matmul_up_sampler: tuple | None = None, strategy_bias_up_sampler: tuple | None = None,
              strategy_residual_add: tuple | None = None) -> AdapterDense:
        """Set how the operators are split: those of the Dense by `..._org`, the others as `AdapterLayer.shard`.

        What the layer lacks (bias, activation) has nothing to split.

        Raises:
            TypeError, ValueError: as `AdapterLayer.shard`.
        """
        set_strategies([*self.strategies(strategy_matmul_org, strategy_bias_org, strategy_activation_org),
                        *self.mindpet_delta_adapter._strategies(
                            strategy_matmul_down_sampler, strategy_bias_down_sampler, strategy_non_linearity,
                            strategy_matmul_up_sampler, strategy_bias_up_sampler, strategy_residual_add)])
        return self


@dataclasses.dataclass(frozen=True)
class AdapterConfig(OutputConfig, AdapterSettings):
    """Settings of the adapter, checked when made; the fields are those of `AdapterDense` and `DeltaConfig`.

    Args:
        bottleneck_size: size of the bottleneck; positive. Default: 64.
        non_linearity: name of the activation in the bottleneck, one of `mindpet_lite.delta.activation.get_activation`;
            "softmax2d" works across the axes of the input, which must then have 3 or 4. Default: "gelu".
        param_init_type: type of what trains: float16, bfloat16 or float32. Default: float32.
        compute_dtype: type that the adapter computes in: float16, bfloat16 or float32. None: the type of `to_float()`,
            else that of its parameters or the weight. Default: None.

    Raises:
        TypeError, ValueError: as `AdapterDense`.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.AdapterConfig(bottleneck_size=2, target_modules=["0"]))
        >>> sum(item.size for item in net.trainable_params())
        42
    """

    pet_type: ClassVar[str] = "adapter"
    layer: ClassVar[type[Adapted]] = Adapter
    by_hand: ClassVar[Mapping[type[Host] | None, type[Adapted]]] = {DenseHost: AdapterDense}
    title: ClassVar[str] = "an adapter"

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        AdapterSettings.__post_init__(self)

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the two maps' weights and biases."""
        size, width = self.bottleneck_size, self.class_for(cell).outputs(cell)
        block = "mindpet_delta_adapter.mindpet_delta_adapter_block"
        down, up = (f"{block}.mindpet_delta_adapter_{which}_sampler" for which in ("down", "up"))
        return {f"{down}.weight": (size, width), f"{down}.bias": (size,),
                f"{up}.weight": (width, size), f"{up}.bias": (width,)}
