"""The config of LoRA: which layer class adapts which kind of layer."""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mindspore import mint, nn

from mindpet_lite.delta.base import Delta, DeltaConfig
from mindpet_lite.delta.dense import dense_refusal
from mindpet_lite.delta.lora.conv import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAMintConv1d,
    LoRAMintConv2d,
    LoRAMintConv3d,
)
from mindpet_lite.delta.lora.dense import LoRADense
from mindpet_lite.delta.lora.embedding import LoRAEmbedding, LoRAMintEmbedding
from mindpet_lite.delta.lora.layer import LoRALayer
from mindpet_lite.delta.lora.linear import LoRALinear
from mindpet_lite.delta.lora.low_rank import LoraSettings, LowRank

_LAYERS: tuple[type[LoRALayer], ...] = (LoRALinear, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding, LoRAMintConv1d,
                                        LoRAMintConv2d, LoRAMintConv3d, LoRAMintEmbedding)
# The LoRA layer of each kind of plain layer.
KINDS: dict[type[nn.Cell], Any] = {nn.Dense: LoRADense, **{layer.plain_type: layer for layer in _LAYERS}}


@dataclasses.dataclass(frozen=True)
class LoraConfig(DeltaConfig, LoraSettings):
    """Settings of LoRA, checked when made; the fields are those of :class:`LoRADense` and :class:`DeltaConfig`.

    They hold for every kind of layer that the targets name: nn.Dense, nn.Conv1d to nn.Conv3d and nn.Embedding, and
    mint.nn's Linear, Conv1d to Conv3d and Embedding. `lora_dropout` does not apply to embeddings, whose ids cannot be
    dropped. Without `lora_a_init` and `lora_b_init` each kind starts as its class does where it is built by hand.

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
        kind, plain = type(cell).__name__, _plain_type(cell)
        if plain is nn.Dense or isinstance(cell, Delta):
            return dense_refusal(cell, "LoRA")
        if plain is None:
            return (f"LoRA adapts nn.Dense, not {kind}; besides Dense it knows "
                    f"{', '.join(layer.plain_name for layer in _LAYERS)}.")
        for name in ("construct", "bprop", "__call__"):
            if getattr(type(cell), name, None) is not getattr(plain, name, None) or name in vars(cell):
                return (f"{kind} overrides {KINDS[plain].plain_name}.{name}, so LoRA cannot know what it computes; "
                        f"build it by hand, or leave it out with exclude_modules.")
        return None

    def adapt(self, cell: nn.Cell) -> LowRank:
        """Return the LoRA cell on the Parameter objects of `cell`."""
        return next(layer for plain, layer in KINDS.items() if isinstance(cell, plain))._on(cell, self)

    @classmethod
    def is_linear(cls, cell: nn.Cell) -> bool:
        """Tell whether ``"all-linear"`` means this cell: a Dense or mint.nn.Linear that is not adapted."""
        return super().is_linear(cell) or isinstance(cell, mint.nn.Linear) and not isinstance(cell, Delta)


def _plain_type(cell: nn.Cell) -> type[nn.Cell] | None:
    return next((plain for plain in KINDS if isinstance(cell, plain)), None)
