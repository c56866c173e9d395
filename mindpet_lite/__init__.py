"""Parameter-efficient tuning native to MindSpore and Ascend."""
from mindpet_lite.compat import install_as_mindpet
from mindpet_lite.delta import (
    AdapterConfig,
    AdapterDense,
    AdapterLayer,
    BitFitConfig,
    LoraConfig,
    LoRADense,
    LowRankAdapterConfig,
    LowRankAdapterDense,
    LowRankAdapterLayer,
)
from mindpet_lite.graph import (
    TrainableParamsCheckPoint,
    adapters_disabled,
    freeze_delta,
    freeze_from_config,
    freeze_modules,
    get_pet_model,
    load_adapter,
    merge,
    save_adapter,
    set_lora_scale,
    summary,
    unmerge,
)

__version__ = "0.1.0"

__all__ = ["AdapterConfig", "AdapterDense", "AdapterLayer", "BitFitConfig", "LoRADense", "LoraConfig",
           "LowRankAdapterConfig", "LowRankAdapterDense", "LowRankAdapterLayer",
           "TrainableParamsCheckPoint", "adapters_disabled", "freeze_delta", "freeze_from_config",
           "freeze_modules", "get_pet_model", "install_as_mindpet", "load_adapter", "merge", "save_adapter",
           "set_lora_scale", "summary", "unmerge"]
