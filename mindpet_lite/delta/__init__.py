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
from mindpet_lite.delta.prefix import PrefixDense, PrefixLayer, PrefixTuningConfig
from mindpet_lite.delta.prefix_dense import prefix_mask, prepend_prefix
from mindpet_lite.delta.ptuning2 import PrefixEmbedding, PrefixEncoder, Ptuning2Config, Ptuning2Dense
from mindpet_lite.delta.r_drop import RDropLoss, rdrop_repeat

METHODS: dict[str, type[DeltaConfig]] = {
    "lora": LoraConfig,
    "prefixtuning": PrefixTuningConfig,
    "adapter": AdapterConfig,
    "low_rank_adapter": LowRankAdapterConfig,
    "bitfit": BitFitConfig,
    "ptuning2": Ptuning2Config,
}

__all__ = ["METHODS", "AdapterConfig", "AdapterDense", "AdapterLayer", "BitFitConfig", "Delta", "DeltaConfig",
           "LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRADense", "LoRAEmbedding", "LoRALinear", "LoRAMintConv1d",
           "LoRAMintConv2d", "LoRAMintConv3d", "LoRAMintEmbedding", "LoraConfig", "LowRankAdapterConfig",
           "LowRankAdapterDense", "LowRankAdapterLayer", "LowRankLinear", "PrefixDense", "PrefixEmbedding",
           "PrefixEncoder", "PrefixLayer", "PrefixTuningConfig", "Ptuning2Config", "Ptuning2Dense", "RDropLoss",
           "prefix_mask", "prepend_prefix", "rdrop_repeat"]
