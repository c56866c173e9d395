"""Aids for training deltas: rates, losses, accumulation, clipping, averages, health, memory, checkpoints, processes."""
from mindpet_lite.train.accumulate import GradientAccumulation
from mindpet_lite.train.allocation import OrthogonalRegularization, RankAllocation
from mindpet_lite.train.checkpoints import TrainableParamsCheckPoint
from mindpet_lite.train.clip import clip_global_norm
from mindpet_lite.train.ema import DeltaEMA
from mindpet_lite.train.groups import lora_plus_groups
from mindpet_lite.train.health import HealthCallback
from mindpet_lite.train.interrupts import Interrupts
from mindpet_lite.train.r_drop import RDropLoss, rdrop_repeat
from mindpet_lite.train.ranks import Ranks, gradient_bytes, init_data_parallel
from mindpet_lite.train.recompute import net_recompute, undo_recompute
from mindpet_lite.train.sampler import BatchSampler
from mindpet_lite.train.state import TrainingState

__all__ = ["BatchSampler", "DeltaEMA", "GradientAccumulation", "HealthCallback", "Interrupts",
           "OrthogonalRegularization", "RDropLoss", "RankAllocation", "Ranks", "TrainableParamsCheckPoint",
           "TrainingState", "clip_global_norm", "gradient_bytes", "init_data_parallel", "lora_plus_groups",
           "net_recompute", "rdrop_repeat", "undo_recompute"]
