"""Parameter-efficient tuning native to MindSpore and Ascend."""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        check_adapters,
        check_optimizer,
        fold_prefixes,
        freeze_delta,
        freeze_from_config,
        freeze_modules,
        freeze_statistics,
        get_pet_model,
        load_adapter,
        merge,
        net_recompute,
        refresh_base,
        save_adapter,
        set_lora_scale,
        summary,
        undo_recompute,
        unmerge,
    )
    from mindpet_lite.train import (
        BatchSampler,
        DeltaEMA,
        GradientAccumulation,
        HealthCallback,
        Interrupts,
        TrainingState,
        clip_global_norm,
        init_data_parallel,
        lora_plus_groups,
    )

__version__ = "0.1.0"

__all__ = ["AdapterConfig", "AdapterDense", "AdapterLayer", "BatchSampler", "BitFitConfig", "DeltaEMA",
           "GradientAccumulation", "HealthCallback", "Interrupts", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d",
           "LoRADense", "LoRAEmbedding", "LoRALinear", "LoraConfig", "LowRankAdapterConfig", "LowRankAdapterDense",
           "LowRankAdapterLayer", "PrefixDense", "PrefixEncoder", "PrefixLayer", "PrefixTuningConfig", "Ptuning2Config",
           "Ptuning2Dense", "TrainableParamsCheckPoint", "TrainingState", "adapters_disabled", "check_adapters",
           "check_optimizer", "clip_global_norm", "fold_prefixes", "freeze_delta", "freeze_from_config",
           "freeze_modules", "freeze_statistics", "get_pet_model", "init_data_parallel", "install_as_mindpet",
           "load_adapter", "lora_plus_groups", "merge", "net_recompute", "prefix_mask", "prepend_prefix",
           "refresh_base", "save_adapter", "set_lora_scale", "summary", "undo_recompute", "unmerge"]

# The rooms with these names. They are opened when a name is first asked for, because they load MindSpore, for which
# what works on files alone (`mindpet-lite merge`, `run`, `--help`) need not wait.
_ROOMS = ("delta", "graph", "train", "compat")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        for room in map(__getattr__, _ROOMS):
            if hasattr(room, name):
                globals()[name] = getattr(room, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *__all__})
