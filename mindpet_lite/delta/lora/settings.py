"""The settings that LoRA has on every kind of layer, checked when made."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import mindspore

from mindpet_lite.arguments import check_alpha, check_bool, check_int, check_probability
from mindpet_lite.delta.base import check_float_type, overflow
from mindpet_lite.delta.data_start import fields_of
from mindpet_lite.delta.lora.corda import CordaConfig
from mindpet_lite.delta.lora.eva import EvaConfig
from mindpet_lite.delta.lora.loftq import LoftQConfig
from mindpet_lite.delta.lora.start import check_start
from mindpet_lite.delta.parts import check_init
from mindpet_lite.formats.starts import takes_from_base

# The settings that MindPet's LoRA did not have.
NEWER = ("use_rslora", "use_dora", "lora_bias")

# By the name of a start the class of its own settings.
START_CONFIGS: dict[str, Any] = {"eva": EvaConfig, "corda": CordaConfig, "loftq": LoftQConfig}


class OwnStart:
    """The initial value that a kind of layer has where a config names none: see `a_start` and `b_start`."""

    def __repr__(self) -> str:
        return "<the layer's own>"


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """Return s, what B A is multiplied with: alpha / rank, or alpha / √rank with rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The settings of a LoRA layer, checked when made; see `LoRADense`.

    Without `lora_a_init` and `lora_b_init` each kind of layer starts as its class does where it is built by hand.
    """

    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_a_init: Any = OwnStart()
    lora_b_init: Any = OwnStart()
    param_init_type: mindspore.dtype = mindspore.float32
    compute_dtype: mindspore.dtype | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    residual_base: bool = False
    eva_config: Any = None
    corda_config: Any = None
    loftq_config: Any = None

    def __post_init__(self) -> None:
        check_int("lora_rank", self.lora_rank)
        check_alpha("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        check_float_type("param_init_type", self.param_init_type)
        if self.compute_dtype is not None:
            check_float_type("compute_dtype", self.compute_dtype)
        types = (mindspore.float32, self.param_init_type, self.compute_dtype or self.param_init_type)
        reason = overflow("the scale", scale_of(self.lora_alpha, self.lora_rank, self.use_rslora is True), types)
        if reason:
            raise ValueError(f"lora_alpha {self.lora_alpha} is too large for lora_rank {self.lora_rank}: {reason}")
        for name in (*NEWER, "residual_base"):
            check_bool(name, getattr(self, name))
        check_start(self.init_lora_weights, self.residual_base)
        for start, kind in START_CONFIGS.items():
            given = getattr(self, f"{start}_config")
            if self.init_lora_weights == start and not self.residual_base:
                object.__setattr__(self, f"{start}_config", fields_of(kind, f"{start}_config", given))
            elif given:
                raise ValueError(f"{start}_config is for init_lora_weights {start!r}, but that is "
                                 f"{self.init_lora_weights!r:.100}: leave one out.")
        if self.init_lora_weights is not True and not (isinstance(self.lora_a_init, OwnStart)
                                                       and isinstance(self.lora_b_init, OwnStart)):
            raise ValueError("init_lora_weights and lora_a_init or lora_b_init both say how the factors start: give "
                             "one of them.")
        if takes_from_base(self.init_lora_weights) and self.use_dora:
            raise ValueError(f"init_lora_weights {self.init_lora_weights!r} does not go with use_dora.")
        if self.use_dora and self.lora_bias:
            raise ValueError("use_dora and lora_bias do not go together: DoRA scales the rows of a weight, and a bias "
                             "of B is in none.")
        for name in ("lora_a_init", "lora_b_init"):
            if not isinstance(getattr(self, name), OwnStart):
                check_init(name, getattr(self, name))
        # Python's own numbers: what numpy counts as a number, JSON does not.
        object.__setattr__(self, "lora_rank", int(self.lora_rank))
        if not isinstance(self.lora_alpha, int):
            object.__setattr__(self, "lora_alpha", float(self.lora_alpha))
