"""HRA: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation.

Yuan et al., 2024, https://arxiv.org/abs/2405.17484, section 3:

    W' = W H_1 H_2 ... H_r,    H_i = I - 2 u_i u_iᵀ / ||u_i||²

Each H_i reflects the inputs of the layer. With Gram-Schmidt (`apply_GS`) the u_i are made orthogonal before.
Two equal reflections in a row are none, so training starts at the base, but for rounding, with every u_i there twice.
With strength t the weight is W + t (W' - W).
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_bool, check_int
from mindpet_lite.delta.adapted import Method, Numbers, Reweighed
from mindpet_lite.delta.hosts import HOSTS, Host, host_of
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type
from mindpet_lite.formats.peft_method import PeftMethod

_U = "mindpet_delta_hra_u"


class HRA(Reweighed):
    """A layer whose weight is multiplied by a chain of trained reflections of its inputs.

    `mindpet_delta_hra_u` is (inputs, r), for a convolution (inputs * kernel, r): each column is one u. A column of
    zeros has no direction, and gives NaN. `scaling` () is the strength. The rule for types is that of
    `mindpet_lite.LoRADense`.
    """

    method = "hra"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of U."""
        return {_U: (math.prod(cls.logical_shape(layer)[1:]), config.r)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return columns at random, each there twice; all different at random, or where they must be orthogonal.

        The bound is that of He's uniform start with the slope √5 of the r numbers of a row, as PEFT has it; a
        reflection does not see it.
        """
        ((size, rank),) = self.shapes(self, config).values()
        is_paired = config.init_weights and not config.apply_GS and not rank % 2
        columns = rank // 2 if is_paired else rank
        bound = 1 / math.sqrt(columns)
        u = np.random.uniform(-bound, bound, (size, columns))
        return {_U: np.repeat(u, 2, axis=1) if is_paired else u}

    def prepare(self, config: Any) -> None:
        """Keep how many reflections there are, and whether they are made orthogonal."""
        self.rank, self.is_orthogonal = config.r, config.apply_GS

    def new_weight(self, weight: Tensor) -> Tensor:
        """Return W H_1 ... H_r."""
        trained = as_type(self.mindpet_delta_hra_u, mindspore.float32)
        rows = ops.reshape(weight, (-1, trained.shape[0]))
        done: list[Tensor] = []
        for index in range(self.rank):
            column = trained[:, index:index + 1]
            if self.is_orthogonal:
                for before in done:
                    column = column - before * ops.matmul(ops.reshape(before, (1, -1)), column)
            column = column * ops.rsqrt(ops.matmul(ops.reshape(column, (1, -1)), column))
            done.append(column)
            rows = rows - 2 * ops.matmul(ops.matmul(rows, column), ops.reshape(column, (1, -1)))
        return ops.reshape(rows, weight.shape)

    @staticmethod
    def reweigh(weight: np.ndarray, tensors: Numbers, settings: Mapping[str, Any]) -> np.ndarray:
        """Return W H_1 ... H_r."""
        rows: np.ndarray = weight.reshape(weight.shape[0], -1)
        done: list[np.ndarray] = []
        for column in tensors[_U].T:
            if settings["apply_GS"]:
                for before in done:
                    column = column - before * (before @ column)
            column = column / np.sqrt(column @ column)
            done.append(column)
            rows = rows - 2 * np.outer(rows @ column, column)
        return rows.reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRAConfig(MethodConfig):
    """Settings of HRA; the names are PEFT's.

    Args:
        r: number of reflections, 1 or more; an even one, where training is to start at the base. Default: 8.
        apply_GS: make the directions orthogonal by the method of Gram and Schmidt. No such reflections are none
            together, so training starts at another net than the base: one that has r directions of the inputs turned
            round. Default: False.
        init_weights: True starts at the base (without `apply_GS`); False at random. Default: True.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: r is below 1.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.HRAConfig(r=2, target_modules=["0"]))
        >>> sum(item.size for item in net.trainable_params())
        8
    """

    pet_type: ClassVar[str] = "hra"
    layer: ClassVar[type[Method]] = HRA
    title: ClassVar[str] = "HRA"
    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if not host.takes_ids)
    peft: ClassVar[PeftMethod] = PeftMethod("HRA", {_U: "hra_u"}, {"r": 8, "apply_GS": False},
                                            neutral={"bias": ("none",)},
                                            written={"bias": "none", "init_weights": True})

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("r", self.r)
        check_bool("apply_GS", self.apply_GS)
        check_bool("init_weights", self.init_weights)

    def for_layer(self, path: str) -> HRAConfig:
        """Return the settings for the layer at `path`.

        Raises:
            ValueError: r is odd, and training is to start at the base. A file may have such an r.
        """
        if self.r % 2 and self.init_weights and not self.apply_GS:
            raise ValueError(f"r must be even, for only pairs of reflections start as the base, but got {self.r}: take "
                             f"{self.r + 1}, or start at random with init_weights=False.")
        return self

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot be adapted: besides what hosts say, a convolution with groups."""
        found, host = super().refusal(cell), host_of(cell)
        if found or host is None or host.group_count(cell) == 1:
            return found
        return (f"HRA knows no convolution with groups, and this one has {host.group_count(cell)}: leave it out with "
                f"exclude_modules.")
