"""An adapter both of whose weights are products of two low-rank factors, as a layer of its own."""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import mindspore
from mindspore import nn
from mindspore.common.initializer import Initializer

from mindpet_lite.delta.base import check_int
from mindpet_lite.delta.bottleneck import BottleneckLayer, BottleneckSettings, Strategy
from mindpet_lite.delta.low_rank_adapter.linear import LowRankLinear
from mindpet_lite.delta.parts import check_init, initial, set_strategies


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankAdapterSettings(BottleneckSettings):
    """The settings of a low-rank adapter, checked when made; see :class:`LowRankAdapterLayer`."""

    reduction_factor: int = 1
    low_rank_size: int = 1
    low_rank_w_init: Any = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction_factor", "low_rank_size"):
            check_int(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))
        if not isinstance(self.low_rank_w_init, (str, Initializer)):
            raise TypeError(f"low_rank_w_init must be an initialiser or its name, but got {self.low_rank_w_init!r} of "
                            f"type {type(self.low_rank_w_init).__name__}.")
        check_init("low_rank_w_init", self.low_rank_w_init)


class LowRankAdapterLayer(BottleneckLayer):
    r"""An adapter both of whose weights are products of two low-rank factors, to be put after a sub-layer of a net.

    .. math:: y = x + s (act(x L_d R_d + b_d) L_u R_u + b_u)

    `mindpet_delta_low_rank_adapter_down_sampler` and `mindpet_delta_low_rank_adapter_up_sampler` are
    :class:`LowRankLinear`, from hidden_size to hidden_size // reduction_factor and back, with
    `mindpet_delta_low_rank_adapter_non_linear` between them. `adapter_scaling` () is s, a Parameter that is never
    trained: it holds the live factor, so that it can change in a compiled graph
    (:func:`mindpet_lite.set_lora_scale`, :func:`mindpet_lite.adapters_disabled`).

    R_u starts at zero and the other factors by `low_rank_w_init`, so the layer starts as the identity, exactly.
    (MindPet starts R_u by `low_rank_w_init` too, and so from another function than the base; that is a deliberate
    difference.)

    Dtype rule: parameters keep their type. The layer computes in `compute_dtype` if given, else in what `to_float()`
    set, else in the type of its parameters. The sum is made in the type of the input, and so is the output. (MindPet
    computes in float16 unless told otherwise; that is a deliberate difference too.)

    Source: Karimi Mahabadi et al., https://arxiv.org/abs/2106.04647, the baseline LowRank.

    Args:
        hidden_size (int): size of the last axis of the input; positive.
        reduction_factor (int): hidden_size by the size of the bottleneck, which is rounded down; from 1 to hidden_size.
        low_rank_size (int): rank of the two weights; positive.
        low_rank_w_init (str | Initializer): start of the factors.
        non_linearity (str): as for :class:`AdapterLayer`.
        param_init_type (mindspore.dtype): type of the parameters: float16, bfloat16 or float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule.

    Inputs:
        - **x** (Tensor): `(*, hidden_size)`, any number of leading axes, none included.

    Outputs:
        Tensor of the shape and type of `x`.

    Raises:
        TypeError: a size is a bool or no int; the non-linearity is unknown; low_rank_w_init is no initialiser or name;
            a type is not float16, bfloat16 or float32.
        ValueError: a size is not positive; reduction_factor is above hidden_size; the initialiser's name is unknown.
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
        the products see :meth:`LowRankLinear.shard`. All are checked before the first is set.

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
