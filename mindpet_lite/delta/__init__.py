"""The methods: one file = one method = one paper = one line in `METHODS`."""
import importlib
from typing import Any

from mindpet_lite.delta.adalora import AdaLoraConfig
from mindpet_lite.delta.adapter import AdapterConfig, AdapterDense, AdapterLayer
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.bitfit import BitFitConfig
from mindpet_lite.delta.boft import BOFTConfig
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.hira import HiraConfig
from mindpet_lite.delta.hosts import Host, linear_host, register_host, unregister_host
from mindpet_lite.delta.hra import HRAConfig
from mindpet_lite.delta.ia3 import IA3Config
from mindpet_lite.delta.ln_tuning import LNTuningConfig
from mindpet_lite.delta.loha import LoHaConfig
from mindpet_lite.delta.lokr import LoKrConfig
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
from mindpet_lite.delta.multitask_prompt_tuning import MultitaskPromptTuningConfig
from mindpet_lite.delta.oft import OFTConfig
from mindpet_lite.delta.p_tuning import PromptEncoderConfig
from mindpet_lite.delta.prefix import PrefixDense, PrefixLayer, PrefixTuningConfig
from mindpet_lite.delta.prefix_dense import prefix_mask, prepend_prefix
from mindpet_lite.delta.prompt_tuning import PromptTuningConfig
from mindpet_lite.delta.ptuning2 import PrefixEmbedding, PrefixEncoder, Ptuning2Config, Ptuning2Dense
from mindpet_lite.delta.trainable_tokens import TrainableTokensConfig
from mindpet_lite.delta.vera import VeraConfig
from mindpet_lite.delta.virtual_tokens import prompt_mask

METHODS: dict[str, type[DeltaConfig]] = {kind.pet_type: kind for kind in (
    LoraConfig,
    PrefixTuningConfig,
    AdapterConfig,
    LowRankAdapterConfig,
    BitFitConfig,
    Ptuning2Config,
    IA3Config,
    LNTuningConfig,
    TrainableTokensConfig,
    OFTConfig,
    BOFTConfig,
    PromptTuningConfig,
    PromptEncoderConfig,
    MultitaskPromptTuningConfig,
    HiraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    VeraConfig,
    AdaLoraConfig,
)}

# The layers that are built by hand, MindPet's functions, and the config of each method.
__all__ = ["METHODS", "AdapterDense", "AdapterLayer", "Delta", "DeltaConfig", "Host", "LoRAConv1d", "LoRAConv2d",
           "LoRAConv3d", "LoRADense", "LoRAEmbedding", "LoRALinear", "LoRAMintConv1d", "LoRAMintConv2d",
           "LoRAMintConv3d", "LoRAMintEmbedding", "LowRankAdapterDense", "LowRankAdapterLayer", "LowRankLinear",
           "PrefixDense", "PrefixEncoder", "PrefixEmbedding", "PrefixLayer", "Ptuning2Dense", "linear_host",
           "prefix_mask", "prepend_prefix", "prompt_mask", "register_host", "unregister_host"]
__all__ += [kind.__name__ for kind in METHODS.values()]


def __getattr__(name: str) -> Any:
    # MindPet has R-Drop here; it lives in train/, which is built on this room: imported when it is asked for.
    if name in ("RDropLoss", "rdrop_repeat"):
        return getattr(importlib.import_module("mindpet_lite.train.r_drop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
