"""The methods: one file = one method = one paper = one line in `METHODS`."""
from mindpet_lite.delta.base import Delta, DeltaConfig
from mindpet_lite.delta.lora import LoraConfig, LoRADense

METHODS: dict[str, type[DeltaConfig]] = {
    "lora": LoraConfig,
}

# What each mode of freeze_delta leaves trainable: the modes MindPet documents, by the parameter names it gives them.
FREEZE_MODES: dict[str, str] = {
    **{name: f"*mindpet_delta_{name}*" for name in ("lora", "prefixtuning", "adapter", "low_rank_adapter", "ptuning2")},
    "bitfit": "*bias",
}

__all__ = ["FREEZE_MODES", "METHODS", "Delta", "DeltaConfig", "LoRADense", "LoraConfig"]
