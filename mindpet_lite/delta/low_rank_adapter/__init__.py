"""LowRank adapter, of Compacter: Efficient Low-Rank Hypercomplex Adapter Layers.

Karimi Mahabadi et al., 2021, https://arxiv.org/abs/2106.04647.

    y = x + s · (act(x Ld Rd + bd) Lu Ru + bu)             (the baseline LowRank: each weight is a product L R)
"""
from mindpet_lite.delta.low_rank_adapter.dense import LowRankAdapterConfig, LowRankAdapterDense
from mindpet_lite.delta.low_rank_adapter.layer import LowRankAdapterLayer
from mindpet_lite.delta.low_rank_adapter.linear import LowRankLinear

__all__ = ["LowRankAdapterConfig", "LowRankAdapterDense", "LowRankAdapterLayer", "LowRankLinear"]
