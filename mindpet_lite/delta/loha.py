"""LoHa: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning.

Hyeon-Woo et al., 2022, https://arxiv.org/abs/2108.06098, section 2.2; for training beside a frozen weight first in
LyCORIS (Yeh et al., 2024, https://arxiv.org/abs/2309.14859, section 3.1):

    ΔW = (B₁ A₁) ⊙ (B₂ A₂)        of rank r² from two products of rank r

A kernel may have tensors t₁, t₂ of its own (FedPara's proposition 3): each product is then
Σij t[i, j, z] b[i, p] a[j, q].
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_bool
from mindpet_lite.delta.adapted import Method, Numbers
from mindpet_lite.delta.decomposed import Decomposed, DecomposedConfig, he_uniform, rebuilt
from mindpet_lite.delta.parts import as_type
from mindpet_lite.formats.decomposed import core_of
from mindpet_lite.formats.peft_method import PeftMethod

_OWN = "mindpet_delta_loha_"
_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")
_CORES = ("t1", "t2")


class LoHa(Decomposed):
    """A layer with the update s · (w1_a w1_b) ⊙ (w2_a w2_b) of its weight, s = alpha / r.

    `mindpet_delta_loha_w1_a` (outputs, r) and `w1_b` (r, inputs of a group · kernel), `w2_a` and `w2_b` likewise. With
    `use_effective_conv2d` and a kernel of more than one place `w1_a` is (r, outputs), `w1_b` (r, inputs of a group),
    and `t1` (r, r, *kernel) stands between them. `scaling` () holds the strength times s. The rule for types is that of
    `mindpet_lite.LoRADense`; ΔW is made in float32.
    """

    method = "loha"
    rescales = True

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of both products' factors, and of the kernel's own tensors where there are."""
        outputs, inputs, *kernel = cls.logical_shape(layer)
        rank, core = config.r, core_of(tuple(kernel), config.use_effective_conv2d)
        a, b = ((rank, outputs), (rank, inputs)) if core else ((outputs, rank), (rank, inputs * math.prod(kernel)))
        return {**{_OWN + name: a if name.endswith("a") else b for name in _FACTORS},
                **({_OWN + name: (rank, rank, *core) for name in _CORES} if core else {})}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return `w2_b` of zeros, all else as torch starts layers; with ``init_weights=False`` that too."""
        return {name: np.zeros(shape) if config.init_weights and name == f"{_OWN}w2_b" else he_uniform(shape)
                for name, shape in self.shapes(self, config).items()}

    def prepare(self, config: Any) -> None:
        """Make operators and keep whether the kernel has tensors of its own."""
        super().prepare(config)
        self.has_core = f"{_OWN}t1" in self.delta_names

    def scaled_weight(self) -> Tensor:
        """Return s · ΔW."""
        dtype = mindspore.float32
        w1_a, w1_b = as_type(self.mindpet_delta_loha_w1_a, dtype), as_type(self.mindpet_delta_loha_w1_b, dtype)
        w2_a, w2_b = as_type(self.mindpet_delta_loha_w2_a, dtype), as_type(self.mindpet_delta_loha_w2_b, dtype)
        # On the smallest tensor.
        w1_b = w1_b * self.scaling
        if self.has_core:
            weight = self.rebuilt(as_type(self.mindpet_delta_loha_t1, dtype), w1_a, w1_b) * self.rebuilt(
                as_type(self.mindpet_delta_loha_t2, dtype), w2_a, w2_b)
            weight = self.in_order(weight, self.delta_shape[1])
        else:
            weight = self.delta_matmul(w1_a, w1_b) * self.delta_matmul(w2_a, w2_b)
        return ops.reshape(weight, self.delta_shape)

    @staticmethod
    def delta(tensors: Numbers, settings: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Return s · ΔW."""
        w1_a, w1_b, w2_a, w2_b = (tensors[_OWN + name] for name in _FACTORS)
        if f"{_OWN}t1" in tensors:
            first, second = (rebuilt(tensors[_OWN + core], a, b)
                             for core, a, b in zip(_CORES, (w1_a, w2_a), (w1_b, w2_b)))
        else:
            first, second = w1_a @ w1_b, w2_a @ w2_b
        return (first * second).reshape(shape) * (settings["alpha"] / settings["r"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaConfig(DecomposedConfig):
    """Settings of LoHa; the names are PEFT's.

    Args:
        r: rank of each of the two products; positive. Default: 8.
        alpha: the update is multiplied with alpha / r; finite and positive. Default: 8.
        rank_dropout: probability, in [0, 1), with which each output of the update drops out in training; the others
            are scaled by (all outputs) / (those that stay). Default: 0.0.
        module_dropout: probability, in [0, 1), with which a layer's whole update drops out in training, without a
            scale. Default: 0.0.
        use_effective_conv2d: kernels of more than one place get tensors of their own (`t1`, `t2`), so that the others
            need not have the kernel's places; nothing changes for dense layers and kernels of one place.
            Default: False.
        init_weights: True starts at the base; False at random. Default: True.
        rank_pattern: another rank for layers whose path ends as a regular expression says. Default: none.
        alpha_pattern: another alpha likewise. Default: none.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoHaConfig(r=2, alpha=4, target_modules=["0"]))
        >>> sum(item.size for item in net.trainable_params())
        48
    """

    pet_type: ClassVar[str] = "loha"
    layer: ClassVar[type[Method]] = LoHa
    title: ClassVar[str] = "LoHa"
    peft: ClassVar[PeftMethod] = PeftMethod(
        "LOHA", {_OWN + name: f"hada_{name}" for name in (*_FACTORS, *_CORES)},
        {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"}, written={"init_weights": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("init_weights", self.init_weights)
