"""Aids for training deltas: groups of learning rates, accumulation, clipping, averages, health."""
from mindpet_lite.train.accumulate import GradientAccumulation
from mindpet_lite.train.clip import clip_global_norm
from mindpet_lite.train.ema import DeltaEMA
from mindpet_lite.train.groups import lora_plus_groups
from mindpet_lite.train.health import HealthCallback

__all__ = ["DeltaEMA", "GradientAccumulation", "HealthCallback", "clip_global_norm", "lora_plus_groups"]
