"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models.

Huang et al., ICLR 2025, https://openreview.net/forum?id=TwJrTz9cRS, section 3:

    W' = W + W ⊙ (B A)

The product with W, number by number, lets an update of r (inputs + outputs) trained numbers have a rank up to that of
W times r. B starts at zero, so training starts at the base. With strength t the update is t W ⊙ (B A).
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_int, check_probability
from mindpet_lite.delta.adapted import Additive, Method, Numbers
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts import host_of
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type
from mindpet_lite.formats.peft_method import PeftMethod

_A, _B = "mindpet_delta_hira_a", "mindpet_delta_hira_b"
# PEFT has other names for the factors of a table.
_TABLE_A, _TABLE_B = "mindpet_delta_hira_embedding_a", "mindpet_delta_hira_embedding_b"


class HiRA(Additive):
    """A layer whose weight is changed by its own product, number by number, with two trained factors.

    `mindpet_delta_hira_a` is (r, inputs, *kernel), `mindpet_delta_hira_b` (outputs, r, 1, ...). On a table
    `mindpet_delta_hira_embedding_a` is (r, ids), `mindpet_delta_hira_embedding_b` (size, r).
    `scaling` () is the strength. The rule for types is that of `mindpet_lite.LoRADense`.
    """

    method = "hira"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        shape, rank = cls.logical_shape(layer), config.r
        if cls.takes_ids:
            return {_TABLE_A: (rank, shape[0]), _TABLE_B: (shape[1], rank)}
        return {_A: (rank, *shape[1:]), _B: (shape[0], rank, *[1] * cls.dims)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return A at random and B zero; on a table, as for LoRA, A zero and B at random."""
        (a_name, a_shape), (b_name, b_shape) = self.shapes(self, config).items()
        if config.init_weights is False:
            return {a_name: np.random.standard_normal(a_shape), b_name: np.random.standard_normal(b_shape)}
        if self.takes_ids:
            return {a_name: np.zeros(a_shape), b_name: np.random.standard_normal(b_shape)}
        if config.init_weights == "gaussian":
            return {a_name: np.random.normal(0.0, 1 / config.r, a_shape), b_name: np.zeros(b_shape)}
        bound = 1 / math.sqrt(math.prod(a_shape[1:]))
        return {a_name: np.random.uniform(-bound, bound, a_shape), b_name: np.zeros(b_shape)}

    def prepare(self, config: Any) -> None:
        """Keep the names of the factors, and make the dropout where there is one; ids cannot be dropped."""
        self.a_name, self.b_name = self.delta_names
        self.has_dropout = config.hira_dropout > 0 and not self.takes_ids
        if self.has_dropout:
            self.hira_dropout = delta_dropout(config.hira_dropout)

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the layer's own output and the update, of whose input training drops some."""
        if self.has_dropout:
            again = self.hira_dropout(again)
        return self.affine(h, self.own_weight(dtype), dtype) + self.update(again, dtype)

    def delta_weight(self) -> Tensor:
        """Return W ⊙ (B A)."""
        a, b = as_type(getattr(self, self.a_name), mindspore.float32), getattr(self, self.b_name)
        rank = a.shape[0]
        product = ops.matmul(ops.reshape(as_type(b, mindspore.float32), (-1, rank)), ops.reshape(a, (rank, -1)))
        if self.takes_ids:
            product = ops.transpose(product, (1, 0))
        weight = as_type(self.logical_weight(), mindspore.float32)
        return weight * ops.reshape(product, weight.shape)

    @classmethod
    def merged(cls, base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return W + W ⊙ (B A)."""
        weight, is_table = base["weight"], _TABLE_A in tensors
        a, b = (tensors[name] for name in ((_TABLE_A, _TABLE_B) if is_table else (_A, _B)))
        product = b.reshape(-1, len(a)) @ a.reshape(len(a), -1)
        return {"weight": weight + weight * (product.T if is_table else product).reshape(weight.shape)}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return what a file's settings say otherwise; dropout, which is of training alone, may differ."""
        return super().unlike({name: value for name, value in settings.items() if name != "hira_dropout"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiraConfig(MethodConfig):
    """Settings of HiRA; the names are PEFT's.

    Args:
        r: rank of B A; positive. Default: 32.
        hira_dropout: probability in [0, 1) of dropping an input of the update in training; not on tables, whose ids
            cannot be dropped. Default: 0.0.
        init_weights: True starts at the base, with A uniform; "gaussian" too, with A from N(0, 1/r²); False at random.
            On a table both start with A zero and B from N(0, 1). Default: True.
        rank_pattern: ranks of single layers, each positive, by patterns of the ends of their paths. Default: none.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: r is below 1; hira_dropout is outside [0, 1); init_weights is none of the three.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.HiraConfig(r=2, target_modules=["0"]))
        >>> sum(item.size for item in net.trainable_params())
        24
    """

    pet_type: ClassVar[str] = "hira"
    layer: ClassVar[type[Method]] = HiRA
    title: ClassVar[str] = "HiRA"
    peft: ClassVar[PeftMethod] = PeftMethod(
        "HIRA", {_A: "hira_A", _B: "hira_B", _TABLE_A: "hira_embedding_A", _TABLE_B: "hira_embedding_B"},
        {"r": 32, "hira_dropout": 0.0}, patterns={"r": "rank_pattern"},
        written={"fan_in_fan_out": False, "init_weights": True})

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("r", self.r)
        check_probability("hira_dropout", self.hira_dropout)
        if not isinstance(self.init_weights, bool) and self.init_weights != "gaussian":
            raise ValueError(f"init_weights must be True, False or 'gaussian', but got {self.init_weights!r:.100}.")

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot be adapted: besides what hosts say, a convolution with groups."""
        found, host = super().refusal(cell), host_of(cell)
        if found or host is None or host.group_count(cell) == 1:
            return found
        return (f"HiRA knows no convolution with groups, and this one has {host.group_count(cell)}: leave it out with "
                f"exclude_modules.")
