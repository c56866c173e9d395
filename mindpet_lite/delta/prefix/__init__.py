"""Prefix-Tuning: Optimizing Continuous Prompts for Generation.

Li & Liang, 2021, https://arxiv.org/abs/2101.00190.

    keys = concat([P_K, X W_Kᵀ]),   values = concat([P_V, X W_Vᵀ])                                       (section 4.2)
    P = MLP(P')                                                                                          (section 4.3)

The net is frozen; the embedding P' and the MLP train. After training they can be folded into P.
"""
from mindpet_lite.delta.prefix.dense import PrefixDense, PrefixTuningConfig
from mindpet_lite.delta.prefix.layer import PrefixLayer

__all__ = ["PrefixDense", "PrefixLayer", "PrefixTuningConfig"]
