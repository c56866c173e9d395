"""What LoHa and LoKr share: the scale alpha / r, a kernel's own tensor, and outputs that drop out in training."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_alpha, check_bool, check_int, check_probability
from mindpet_lite.delta.adapted import Additive
from mindpet_lite.delta.base import overflow
from mindpet_lite.delta.dropout import DeltaDropout, delta_dropout
from mindpet_lite.delta.hosts import HOSTS, Host
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type

Self = TypeVar("Self", bound="Decomposed")
# What a layer keeps as it is where a file says otherwise: it matters in training alone.
_IN_TRAINING = ("rank_dropout", "module_dropout", "rank_dropout_scale")


class Decomposed(Additive):
    """y = finish(W h + b + s · ΔW h) with s = alpha / r, for a ΔW made of factors.

    In training each output of ΔW h is left out with the probability `rank_dropout`, and all of it with
    `module_dropout`; one draw counts for the whole batch.

    A subclass writes `scaled_weight` in operators, and `delta` in numpy.
    """

    # What stays is multiplied so that the mean of all outputs' factors is 1.
    rescales: bool = False

    @classmethod
    def _on(cls: type[Self], plain: nn.Cell, settings: Any) -> Self:
        layer = super()._on(plain, settings)
        reason = layer.overflows(layer.strength)
        if reason:
            raise ValueError(f"{reason[0].upper()}{reason[1:]} Lower alpha.")
        return layer

    def prepare(self, config: Any) -> None:
        """Make the operators, those of dropout only where there is a rate."""
        self.delta_matmul, self.delta_matmul_turned = ops.MatMul(), ops.MatMul(transpose_a=True)
        self.delta_shape = self.logical_shape(self)
        self.delta_outputs = self.outputs(self)
        self.over_outputs = self.across(self.delta_outputs)
        self.over_all = (1,) * len(self.over_outputs)
        self.drops_outputs, self.drops_all = config.rank_dropout > 0, config.module_dropout > 0
        self.has_dropout = self.drops_outputs or self.drops_all
        if self.drops_outputs:
            self.output_dropout = _operator(config.rank_dropout)
        if self.drops_all:
            self.whole_dropout = _operator(config.module_dropout)

    def factor(self) -> float:
        """Return alpha / r."""
        return self.config.alpha / self.config.r

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the layer's own output and the update, without what drops out."""
        update = self.update(again, dtype)
        if self.has_dropout and self.training:
            update = update * as_type(self.kept(), dtype)
        return self.affine(h, self.own_weight(dtype), dtype) + update

    def update(self, h: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what s · ΔW makes of the arranged input."""
        return self.by_weight(h, dtype)

    def by_weight(self, h: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the same by making s · ΔW."""
        return self.linear(h, self.laid_out(as_type(self.scaled_weight(), dtype)), dtype)

    def scaled_weight(self) -> Tensor:
        """Return s · ΔW in `logical_shape` and float32."""
        raise NotImplementedError

    def kept(self) -> Tensor:
        """Return in float32, in the shape that multiplies outputs, 0 for each that drops out, else 1 or more."""
        factor = ops.ones(self.over_outputs, mindspore.float32)
        if self.drops_outputs:
            factor = _stays(self.output_dropout, factor)
            if self.rescales:
                # Where all drop out there is nothing to be scaled.
                factor = factor * (self.delta_outputs / ops.maximum(factor.sum(), 1.0))
        if self.drops_all:
            factor = factor * _stays(self.whole_dropout, ops.ones(self.over_all, mindspore.float32))
        return factor

    def rebuilt(self, core: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return Σij t[i, j, z] a[i, p] b[j, q] with the axes (p, z q), which `in_order` turns.

        Args:
            core: t (rank, rank, *kernel).
            a: (rank, outputs).
            b: (rank, inputs).
        """
        rank = core.shape[0]
        places = ops.transpose(ops.reshape(core, (rank, rank, -1)), (0, 2, 1))
        inner = self.delta_matmul(ops.reshape(places, (-1, rank)), b)
        return self.delta_matmul_turned(a, ops.reshape(inner, (rank, -1)))

    def in_order(self, flat: Tensor, inputs: int) -> Tensor:
        """Return (p, q, z) for (p, z q)."""
        return ops.transpose(ops.reshape(flat, (flat.shape[0], -1, inputs)), (0, 2, 1))

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return where the scale is too large: it is taken over; all else shows in the tensors, or may differ."""
        scale = settings["alpha"] / settings["r"]
        return list(filter(None, [overflow("the scale in the file", scale, (mindspore.float32, self._compute_type()))]))

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over what a file's tensors were made with; not what drops out in training."""
        own = {name: value for name, value in settings.items() if name not in _IN_TRAINING}
        self.config = dataclasses.replace(self.config, **own)
        self.refresh()


def _operator(rate: float) -> DeltaDropout:
    """Return the operator of dropout alone, whose result tells what stays."""
    operator: DeltaDropout = delta_dropout(rate).dropout
    return operator


def _stays(dropout: DeltaDropout, ones: Tensor) -> Tensor:
    """Return 1 for what stays and 0 for what drops out."""
    return ops.cast(ops.greater(dropout(ones)[0], 0.0), mindspore.float32)


def rebuilt(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Σij t[i, j, *z] a[i, p] b[j, q] with the axes (p, q, *z)."""
    return np.einsum("ij...,ip,jq->pq...", core, a, b)


def he_uniform(shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers uniform in ±1 / √(what one output sees), as torch starts its layers and PEFT these factors."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return np.random.uniform(-bound, bound, shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecomposedConfig(MethodConfig):
    """Settings that LoHa and LoKr have; the names are PEFT's. Each config documents them."""

    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if not host.takes_ids)

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("r", self.r)
        check_alpha("alpha", self.alpha)
        check_probability("rank_dropout", self.rank_dropout)
        check_probability("module_dropout", self.module_dropout)
        check_bool("use_effective_conv2d", self.use_effective_conv2d)
