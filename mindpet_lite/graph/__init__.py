"""What is done to a whole net: adapt, freeze, merge, save, load. Knows no method by name."""
import importlib
from typing import Any

from mindpet_lite.graph.batches import adapters_for_samples, reserve_adapters
from mindpet_lite.graph.cast import cast_to_float32
from mindpet_lite.graph.check import check_adapters
from mindpet_lite.graph.fold import fold_prefixes
from mindpet_lite.graph.freeze import TrainableReport, freeze_delta, freeze_from_config, freeze_modules
from mindpet_lite.graph.from_data import initialize_from_data
from mindpet_lite.graph.inject import get_pet_model
from mindpet_lite.graph.load_named import load_adapter
from mindpet_lite.graph.merge import merge, unmerge
from mindpet_lite.graph.optimizer import check_optimizer
from mindpet_lite.graph.peft_calls import (
    disable_adapter,
    get_adapter_state,
    merge_and_unload,
    print_trainable_parameters,
    set_adapter_state,
)
from mindpet_lite.graph.quantise import dequantize_base, quantize_base
from mindpet_lite.graph.refresh import refresh_base
from mindpet_lite.graph.save import save_adapter
from mindpet_lite.graph.several import (
    active_adapters,
    add_adapter,
    combine_adapters,
    delete_adapter,
    set_adapter,
)
from mindpet_lite.graph.split import split_linear
from mindpet_lite.graph.statistics import freeze_statistics
from mindpet_lite.graph.strength import adapters_disabled, set_lora_scale
from mindpet_lite.graph.summary import Summary, summary

__all__ = ["Summary", "TrainableReport", "active_adapters", "adapters_disabled", "adapters_for_samples",
           "add_adapter", "cast_to_float32", "check_adapters", "check_optimizer", "combine_adapters",
           "delete_adapter", "dequantize_base", "disable_adapter", "fold_prefixes", "freeze_delta",
           "freeze_from_config", "freeze_modules", "freeze_statistics", "get_adapter_state", "get_pet_model",
           "initialize_from_data", "load_adapter", "merge", "merge_and_unload", "print_trainable_parameters",
           "quantize_base", "refresh_base", "reserve_adapters", "save_adapter", "set_adapter", "set_adapter_state",
           "set_lora_scale", "split_linear", "summary", "unmerge"]


def __getattr__(name: str) -> Any:
    # MindPet has its callback here; it lives in train/, which is built on this room: imported when it is asked for.
    if name == "TrainableParamsCheckPoint":
        return importlib.import_module("mindpet_lite.train").TrainableParamsCheckPoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
