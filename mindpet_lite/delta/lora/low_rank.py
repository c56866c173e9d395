"""What LoRA is on every kind of layer: its settings, its two factors and the live factor that scales them."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common.initializer import HeUniform

from mindpet_lite.delta.base import (
    Delta,
    check_float_type,
    check_int,
    check_positive,
    check_probability,
    warn_user,
)
from mindpet_lite.delta.parts import check_init, initial

HE_UNIFORM = HeUniform(negative_slope=math.sqrt(5))


class OwnStart:
    """The initial value that a kind of layer has where a config names none: see `a_start` and `b_start`."""

    def __repr__(self) -> str:
        return "<the layer's own>"


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The settings of a LoRA layer, checked when made; see :class:`LoRADense`.

    Without `lora_a_init` and `lora_b_init` each kind of layer starts as its class does where it is built by hand.
    """

    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_a_init: Any = OwnStart()
    lora_b_init: Any = OwnStart()
    param_init_type: mindspore.dtype = mindspore.float32
    compute_dtype: mindspore.dtype | None = None

    def __post_init__(self) -> None:
        check_int("lora_rank", self.lora_rank)
        check_positive("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        check_float_type("param_init_type", self.param_init_type)
        if self.compute_dtype is not None:
            check_float_type("compute_dtype", self.compute_dtype)
        for name in ("lora_a_init", "lora_b_init"):
            if not isinstance(getattr(self, name), OwnStart):
                check_init(name, getattr(self, name))
        # Python's own numbers: what numpy counts as a number, JSON does not.
        object.__setattr__(self, "lora_rank", int(self.lora_rank))
        if not isinstance(self.lora_alpha, int):
            object.__setattr__(self, "lora_alpha", float(self.lora_alpha))


class LowRank(Delta):
    """The LoRA half of an adapted layer: factors A and B under `delta_names`, and the live factor `lora_scaling`."""

    method: ClassVar[str] = "lora"
    delta_names = ("mindpet_delta_lora_a", "mindpet_delta_lora_b")
    live_names = ("lora_scaling",)
    # How A and B start unless the settings say otherwise.
    a_start: ClassVar[Any] = HE_UNIFORM
    b_start: ClassVar[Any] = "zeros"

    lora_rank: int
    lora_alpha: float
    dropout_rate: float
    lora_scaling: Parameter

    def _add_factors(self, config: LoraSettings, a_shape: tuple[int, ...], b_shape: tuple[int, ...],
                     weight: Parameter, most: int) -> None:
        """Make the Parameters; `most` is the rank that the update can have."""
        values = [initial(name, own if isinstance(given, OwnStart) else given, shape, config.param_init_type)
                  for name, given, own, shape in (("lora_a_init", config.lora_a_init, self.a_start, a_shape),
                                                  ("lora_b_init", config.lora_b_init, self.b_start, b_shape))]
        if config.lora_rank > most:
            warn_user(f"lora_rank {config.lora_rank} is above the highest rank of the layer's weight = {most}: the "
                      f"update cannot use it.")
        self.lora_rank, self.lora_alpha = config.lora_rank, config.lora_alpha
        self.dropout_rate = float(config.lora_dropout)
        # The delta's names go beside the weight's.
        head, _, last = weight.name.rpartition(".")
        prefix = f"{head}." if head and last in ("weight", "embedding_table") else ""
        for name, value in zip(self.delta_names, values):
            setattr(self, name, Parameter(value, name=prefix + name))
        self.lora_scaling = Parameter(Tensor(self.lora_alpha / self.lora_rank, mindspore.float32),
                                      name=prefix + "lora_scaling", requires_grad=False)

    def refresh(self) -> None:
        """Set the live factor to ``strength · lora_alpha / lora_rank``, or 0 where switched off."""
        factor = self.strength * self.lora_alpha / self.lora_rank if self.enabled else 0.0
        self.lora_scaling.set_data(Tensor(factor, mindspore.float32))

    def _factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return A and s · B in float32, with the live factor s of the running net."""
        a, b = (getattr(self, name).astype(mindspore.float32).asnumpy() for name in self.delta_names)
        return a, b * self.lora_scaling.asnumpy()

    def settings(self) -> dict[str, Any]:
        """Return lora_rank, lora_alpha and lora_dropout."""
        return {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": self.dropout_rate}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return nothing: alpha is taken over, another rank shows in the shapes, dropout may differ."""
        return []

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over lora_alpha: it is a value; the rank is a shape."""
        self.lora_alpha = settings["lora_alpha"]
        self.refresh()


def absorbed(weight: Parameter, update: np.ndarray) -> dict[Parameter, Tensor]:
    """Return {weight: weight + update}, added in float32 and rounded once to the weight's type."""
    # What is not finite is for the caller to refuse, by name.
    with np.errstate(over="ignore", invalid="ignore"):
        return {weight: Tensor(update + weight.astype(mindspore.float32).asnumpy()).astype(weight.dtype)}
