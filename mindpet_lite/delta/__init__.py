"""The methods: one file = one method = one paper = one line in `METHODS`."""
from mindpet_lite.delta.adapter import AdapterConfig, AdapterDense, AdapterLayer
from mindpet_lite.delta.base import Delta, DeltaConfig
from mindpet_lite.delta.bitfit import BitFitConfig
from mindpet_lite.delta.lora import (
    LoraConfig,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRADense,
    LoRAEmbedding,
    LoRALinear,
    LoRAMintConv1d,
    LoRAMintConv2d,
    LoRAMintConv3d,
    LoRAMintEmbedding,
)
from mindpet_lite.delta.low_rank_adapter import (
    LowRankAdapterConfig,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    LowRankLinear,
)
from mindpet_lite.delta.r_drop import RDropLoss, rdrop_repeat

METHODS: dict[str, type[DeltaConfig]] = {
    "lora": LoraConfig,
    "adapter": AdapterConfig,
    "low_rank_adapter": LowRankAdapterConfig,
    "bitfit": BitFitConfig,
}

__all__ = ["METHODS", "AdapterConfig", "AdapterDense", "AdapterLayer", "BitFitConfig", "Delta", "DeltaConfig",
           "LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRADense", "LoRAEmbedding", "LoRALinear", "LoRAMintConv1d",
           "LoRAMintConv2d", "LoRAMintConv3d", "LoRAMintEmbedding", "LoraConfig", "LowRankAdapterConfig",
           "LowRankAdapterDense", "LowRankAdapterLayer", "LowRankLinear", "RDropLoss", "rdrop_repeat"]
