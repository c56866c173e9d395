"""The methods: one file = one method = one paper = one line in `METHODS`."""
from mindpet_lite.delta.base import Delta, DeltaConfig
from mindpet_lite.delta.bitfit import BitFitConfig
from mindpet_lite.delta.lora import LoraConfig, LoRADense
from mindpet_lite.delta.r_drop import RDropLoss, rdrop_repeat

METHODS: dict[str, type[DeltaConfig]] = {
    "lora": LoraConfig,
    "bitfit": BitFitConfig,
}

__all__ = ["METHODS", "BitFitConfig", "Delta", "DeltaConfig", "LoRADense", "LoraConfig", "RDropLoss", "rdrop_repeat"]
