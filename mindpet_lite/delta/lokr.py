"""LoKr: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation.

Yeh et al., 2024, https://arxiv.org/abs/2309.14859, section 3.1; first in KronA (Edalati et al., 2022,
https://arxiv.org/abs/2212.10650):

    ΔW = C ⊗ (B A)        a Kronecker product, each of whose factors may be a product of rank r

C (l, m) and D = B A (k, n) need no product to be made: with the input cut into m parts of n numbers each, (C ⊗ D) x is
D on each part, and then a sum of the parts with C's numbers, which is less work by a factor of about l.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_bool, check_int
from mindpet_lite.delta.adapted import Method, Numbers
from mindpet_lite.delta.decomposed import Decomposed, DecomposedConfig, he_uniform, rebuilt
from mindpet_lite.delta.parts import as_type
from mindpet_lite.formats.decomposed import core_of, factors_of, first_shapes, second_shapes
from mindpet_lite.formats.peft_method import PeftMethod

_OWN = "mindpet_delta_lokr_"
_NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
# What starts at zero, by the setting.
_ZERO = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}


class LoKr(Decomposed):
    """A layer with the update s · (w1 ⊗ w2) of its weight, s = alpha / r.

    `mindpet_delta_lokr_w1` is (l, m) and `w2` (k, n, *kernel), where l · k are the outputs and m · n the inputs of a
    group, cut as `decompose_factor` says. Where r is small for it `w2` is `w2_a` (k, r) times `w2_b` (r, n · kernel),
    or with `use_effective_conv2d` `w2_a` (r, k), `w2_b` (r, n) and `t2` (r, r, *kernel); with `decompose_both` `w1`
    likewise is `w1_a` (l, r) times `w1_b` (r, m). `scaling` () holds the strength times s. The rule for types is that
    of `mindpet_lite.LoRADense`.
    """

    method = "lokr"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what both factors are made of."""
        (outer, inner, first, second), kernel = _cut(cls.logical_shape(layer), config.decompose_factor)
        core = core_of(kernel, config.use_effective_conv2d)
        found = {**first_shapes(outer, first, config.r, config.decompose_both),
                 **second_shapes(inner, second, config.r, kernel, core)}
        return {_OWN + name: shape for name, shape in found.items()}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return a zero for one factor, all else as torch starts layers."""
        zero = [_OWN + name for name in _ZERO[config.init_weights]]
        return {name: np.zeros(shape) if name in zero else he_uniform(shape)
                for name, shape in self.shapes(self, config).items()}

    def prepare(self, config: Any) -> None:
        """Make operators and keep the sizes, and which tensors there are."""
        super().prepare(config)
        self.rescales = config.rank_dropout_scale
        self.cut_sizes, kernel = _cut(self.delta_shape, config.decompose_factor)
        _, inner, _, second = self.cut_sizes
        self.is_first_whole = f"{_OWN}w1" in self.delta_names
        self.is_second_whole = f"{_OWN}w2" in self.delta_names
        self.has_core = f"{_OWN}t2" in self.delta_names
        self.second_shape = (inner, second, *kernel)
        # Two narrow products take less than one with what they make.
        self.goes_twice = not self.dims and not self.is_second_whole and config.r * (inner + second) < inner * second
        # The outputs of a group see its own inputs, which parts of all inputs do not follow.
        self.has_groups = self.group_count(self) > 1
        if not self.has_groups:
            self.add_low_rank_operators(inner)
            self.mix = ops.BatchMatMul()

    def first(self) -> Tensor:
        """Return s · w1 in float32."""
        dtype = mindspore.float32
        if self.is_first_whole:
            return as_type(self.mindpet_delta_lokr_w1, dtype) * self.scaling
        return self.delta_matmul(as_type(self.mindpet_delta_lokr_w1_a, dtype) * self.scaling,
                                 as_type(self.mindpet_delta_lokr_w1_b, dtype))

    def second(self) -> Tensor:
        """Return w2 in float32, (k, n, *kernel)."""
        dtype = mindspore.float32
        if self.is_second_whole:
            return as_type(self.mindpet_delta_lokr_w2, dtype)
        a, b = as_type(self.mindpet_delta_lokr_w2_a, dtype), as_type(self.mindpet_delta_lokr_w2_b, dtype)
        if self.has_core:
            flat = self.rebuilt(as_type(self.mindpet_delta_lokr_t2, dtype), a, b)
            return ops.reshape(self.in_order(flat, self.second_shape[1]), self.second_shape)
        return ops.reshape(self.delta_matmul(a, b), self.second_shape)

    def update(self, h: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what s · (w1 ⊗ w2) makes of the arranged input; the product is made for groups alone."""
        if self.has_groups:
            return self.by_weight(h, dtype)
        if self.dims:
            return self.over_space(h, as_type(self.first(), dtype), dtype)
        return self.over_rows(h, as_type(self.first(), dtype), dtype)

    def over_rows(self, h: Tensor, first: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the update of vectors: parts are moved, never single numbers."""
        outer, inner, parts, size = self.cut_sizes
        rows = ops.transpose(ops.reshape(h, (-1, parts, size)), (1, 0, 2))
        rows = ops.reshape(rows, (-1, size))
        if self.goes_twice:
            rows = self.narrow(rows, self.mindpet_delta_lokr_w2_b, dtype)
            rows = self.narrow(rows, self.mindpet_delta_lokr_w2_a, dtype)
        else:
            rows = self.narrow(rows, self.second(), dtype)
        mixed = self.delta_matmul(first, ops.reshape(rows, (parts, -1)))
        y = ops.transpose(ops.reshape(mixed, (outer, -1, inner)), (1, 0, 2))
        return ops.reshape(y, (*h.shape[:-1], outer * inner))

    def over_space(self, h: Tensor, first: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the update of channels: the layer's own sliding with w2 on each part, then sums of the parts."""
        outer, inner, parts, size = self.cut_sizes
        shape = h.shape
        batch, space = shape[:-self.dims - 1], shape[-self.dims:]
        low = self.narrow(ops.reshape(h, (-1, size, *space)), self.second(), dtype)
        rows = ops.reshape(low, (*batch, parts, -1))
        y = self.mix(ops.broadcast_to(first, (*batch, outer, parts)), rows)
        return ops.reshape(y, (*batch, outer * inner, *low.shape[-self.dims:]))

    def scaled_weight(self) -> Tensor:
        """Return s · (w1 ⊗ w2)."""
        outer, inner, first, _ = self.cut_sizes
        product = self.delta_matmul(ops.reshape(self.first(), (-1, 1)), ops.reshape(self.second(), (1, -1)))
        blocks = ops.transpose(ops.reshape(product, (outer, first, inner, -1)), (0, 2, 1, 3))
        return ops.reshape(blocks, self.delta_shape)

    @staticmethod
    def delta(tensors: Numbers, settings: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Return s · (w1 ⊗ w2)."""
        own = {name: tensors[_OWN + name] for name in _NAMES if _OWN + name in tensors}
        (_, inner, _, second), kernel = _cut(shape, settings["decompose_factor"])
        first = own["w1"] if "w1" in own else own["w1_a"] @ own["w1_b"]
        if "t2" in own:
            other = rebuilt(own["t2"], own["w2_a"], own["w2_b"])
        else:
            other = own["w2"] if "w2" in own else own["w2_a"] @ own["w2_b"]
        product = np.kron(first.reshape(*first.shape, *[1] * len(kernel)), other.reshape(inner, second, *kernel))
        return product * (settings["alpha"] / settings["r"])


def _cut(shape: tuple[int, ...], factor: int) -> tuple[tuple[int, int, int, int], tuple[int, ...]]:
    """Return l, k, m, n for a weight (l k, m n, *kernel), and the kernel."""
    outputs, inputs, *kernel = shape
    return (*factors_of(outputs, factor), *factors_of(inputs, factor)), tuple(kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrConfig(DecomposedConfig):
    """Settings of LoKr; the names are PEFT's.

    Args:
        r: rank of the products that the factors may be; positive. A factor is whole where r is at least half its larger
            side. Default: 8.
        alpha: the update is multiplied with alpha / r, also where both factors are whole; finite and positive.
            Default: 8.
        rank_dropout: probability, in [0, 1), with which each output of the update drops out in training. Default: 0.0.
        rank_dropout_scale: scale the others by (all outputs) / (those that stay) then. Default: False.
        module_dropout: probability, in [0, 1), with which a layer's whole update drops out in training, without a
            scale. Default: 0.0.
        use_effective_conv2d: kernels of more than one place get a tensor of their own (`t2`) where `w2` is a product;
            nothing changes for dense layers and kernels of one place. Default: False.
        decompose_both: the smaller factor `w1` may be a product too. Default: False.
        decompose_factor: into which sizes outputs and inputs are cut: this positive number and the rest where it
            divides them, else the largest divisor up to it and to the root. -1: as near to the root as goes. Default:
            -1.
        init_weights: True starts at the base, with `w1` zero; "lycoris" likewise with `w2` zero, as LyCORIS does;
            False at random. Default: True.
        rank_pattern: another rank for layers whose path ends as a regular expression says. Default: none.
        alpha_pattern: another alpha likewise. Default: none.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoKrConfig(r=8, alpha=8, target_modules=["0"]))
        >>> sum(item.size for item in net.trainable_params())
        12
    """

    pet_type: ClassVar[str] = "lokr"
    layer: ClassVar[type[Method]] = LoKr
    title: ClassVar[str] = "LoKr"
    peft: ClassVar[PeftMethod] = PeftMethod(
        "LOKR", {_OWN + name: f"lokr_{name}" for name in _NAMES},
        {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False,
         "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"}, written={"init_weights": True})

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("decompose_both", self.decompose_both)
        check_bool("rank_dropout_scale", self.rank_dropout_scale)
        if self.decompose_factor != -1:
            check_int("decompose_factor", self.decompose_factor)
        if not isinstance(self.init_weights, bool) and self.init_weights != "lycoris":
            raise ValueError(f"init_weights must be True, False or 'lycoris', but got {self.init_weights!r:.100}.")
