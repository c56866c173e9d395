"""The low-rank adapter on `nn.Dense`, and its config."""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import mindspore
from mindspore import nn

from mindpet_lite.delta.base import DeltaConfig
from mindpet_lite.delta.bottleneck import BottleneckDense
from mindpet_lite.delta.dense import dense_refusal
from mindpet_lite.delta.low_rank_adapter.layer import LowRankAdapterLayer, LowRankAdapterSettings


class LowRankAdapterDense(BottleneckDense):
    r"""A Dense layer with a low-rank adapter behind its activation.

    .. math:: h = act(x W^T + b), y = h + s (act_a(h L_d R_d + b_d) L_u R_u + b_u)

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them;
    `mindpet_delta_low_rank_adapter` is the :class:`LowRankAdapterLayer`, and `adapter_scaling` () its live factor s.
    The layer starts equal to its base, exactly. For the dtype rule see :class:`LowRankAdapterLayer`; without
    `compute_dtype` and `to_float()` the whole layer computes in the type of `weight`.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        weight_init (Tensor | str | Initializer | number): start of `weight`.
        bias_init (Tensor | str | Initializer | number): start of `bias`.
        has_bias (bool): whether there is a `bias`.
        activation (str | Cell | Primitive | None): activation of the Dense, before the adapter.
        reduction_factor (int): out_channels by the size of the bottleneck; from 1 to out_channels.
        low_rank_size (int): as for :class:`LowRankAdapterLayer`.
        low_rank_w_init (str | Initializer): as for :class:`LowRankAdapterLayer`.
        non_linearity (str): as for :class:`LowRankAdapterLayer`.
        param_init_type (mindspore.dtype): type of the adapter's parameters: float16, bfloat16 or float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule.
        dtype (mindspore.dtype): type of `weight` and `bias`.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)` of the type of `x`.

    Raises:
        TypeError: as :class:`LowRankAdapterLayer`; `activation` or an initialiser is of no known kind.
        ValueError: as :class:`LowRankAdapterLayer`; an initial Tensor has the wrong shape; the activation's (a
            KeyError too) or initialiser's name is unknown.
    """

    method: ClassVar[str] = "low_rank_adapter"
    delta_names = ("mindpet_delta_low_rank_adapter",)

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

    def _add_delta(self, config: LowRankAdapterSettings) -> None:
        self._attach(LowRankAdapterLayer(self.out_channels, config.reduction_factor, config.low_rank_size,
                                         config.low_rank_w_init, config.non_linearity, config.param_init_type,
                                         config.compute_dtype))

    def shard(self, strategy_matmul_org: tuple | None = None, strategy_bias_org: tuple | None = None,
              strategy_activation_org: tuple | None = None,
              strategy_matmul_down_sampler_weight: tuple | None = None,
              strategy_matmul_down_sampler_input: tuple | None = None,
              strategy_bias_down_sampler: tuple | None = None, strategy_non_linearity: tuple | None = None,
              strategy_matmul_up_sampler_weight: tuple | None = None,
              strategy_matmul_up_sampler_input: tuple | None = None, strategy_bias_up_sampler: tuple | None = None,
              strategy_residual_add: tuple | None = None) -> LowRankAdapterDense:
        """Set how the operators are split: the Dense's by `..._org`, others as :meth:`LowRankAdapterLayer.shard`.

        What the layer lacks (bias, activation) has nothing to split.

        Raises:
            TypeError, ValueError: as :meth:`LowRankAdapterLayer.shard`.
        """
        self._shard(strategy_matmul_org, strategy_bias_org, strategy_activation_org,
                    self.mindpet_delta_low_rank_adapter._strategies(
                        (strategy_matmul_down_sampler_weight, strategy_matmul_down_sampler_input,
                         strategy_bias_down_sampler), strategy_non_linearity,
                        (strategy_matmul_up_sampler_weight, strategy_matmul_up_sampler_input,
                         strategy_bias_up_sampler), strategy_residual_add))
        return self


@dataclasses.dataclass(frozen=True)
class LowRankAdapterConfig(DeltaConfig, LowRankAdapterSettings):
    """Settings of the low-rank adapter; the fields are those of :class:`LowRankAdapterDense` and `DeltaConfig`.

    Raises:
        TypeError, ValueError: as :class:`LowRankAdapterDense`.
    """

    pet_type: ClassVar[str] = "low_rank_adapter"

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        LowRankAdapterSettings.__post_init__(self)

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot carry a low-rank adapter, or None."""
        return dense_refusal(cell, "a low-rank adapter")

    def adapt(self, cell: nn.Cell) -> LowRankAdapterDense:
        """Return the adapter cell on the Parameter objects of `cell`."""
        return LowRankAdapterDense._on(cell, self)
