"""Parameter-efficient tuning native to MindSpore and Ascend."""
from mindpet_lite.compat import install_as_mindpet
from mindpet_lite.delta import (
    AdapterConfig,
    AdapterDense,
    AdapterLayer,
    BitFitConfig,
    LoraConfig,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRADense,
    LoRAEmbedding,
    LoRALinear,
    LowRankAdapterConfig,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    PrefixDense,
    PrefixEncoder,
    PrefixLayer,
    PrefixTuningConfig,
    Ptuning2Config,
    Ptuning2Dense,
    prefix_mask,
    prepend_prefix,
)
from mindpet_lite.graph import (
    TrainableParamsCheckPoint,
    adapters_disabled,
    fold_prefixes,
    freeze_delta,
    freeze_from_config,
    freeze_modules,
    get_pet_model,
    load_adapter,
    merge,
    net_recompute,
    save_adapter,
    set_lora_scale,
    summary,
    undo_recompute,
    unmerge,
)
from mindpet_lite.train import DeltaEMA, GradientAccumulation, HealthCallback, clip_global_norm, lora_plus_groups

__version__ = "0.1.0"

__all__ = ["AdapterConfig", "AdapterDense", "AdapterLayer", "BitFitConfig", "DeltaEMA", "GradientAccumulation",
           "HealthCallback", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRADense", "LoRAEmbedding", "LoRALinear",
           "LoraConfig", "LowRankAdapterConfig", "LowRankAdapterDense", "LowRankAdapterLayer", "PrefixDense",
           "PrefixEncoder", "PrefixLayer", "PrefixTuningConfig", "Ptuning2Config", "Ptuning2Dense",
           "TrainableParamsCheckPoint", "adapters_disabled", "clip_global_norm", "fold_prefixes", "freeze_delta",
           "freeze_from_config", "freeze_modules", "get_pet_model", "install_as_mindpet", "load_adapter",
           "lora_plus_groups", "merge", "net_recompute", "prefix_mask", "prepend_prefix", "save_adapter",
           "set_lora_scale", "summary", "undo_recompute", "unmerge"]
