"""The config of LoRA: which layer class adapts which kind of layer."""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from mindspore import nn

from mindpet_lite.delta.base import DeltaConfig
from mindpet_lite.delta.dense import dense_refusal
from mindpet_lite.delta.lora.dense import LoRADense
from mindpet_lite.delta.lora.low_rank import LoraSettings, LowRank


@dataclasses.dataclass(frozen=True)
class LoraConfig(DeltaConfig, LoraSettings):
    """Settings of LoRA, checked when made; the fields are those of :class:`LoRADense` and :class:`DeltaConfig`.

    Raises:
        TypeError, ValueError: as :class:`LoRADense`.
    """

    pet_type: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        LoraSettings.__post_init__(self)

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot carry LoRA, or None."""
        return dense_refusal(cell, "LoRA")

    def adapt(self, cell: nn.Cell) -> LowRank:
        """Return the LoRA cell on the Parameter objects of `cell`."""
        return LoRADense._on(cell, self)
