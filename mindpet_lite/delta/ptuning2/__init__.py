"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks.

Liu et al., 2022, https://arxiv.org/abs/2110.07602.

    keys = concat([P_K, X W_Kᵀ]),   values = concat([P_V, X W_Vᵀ])      in every layer of the net        (section 3.2)

P is a Parameter, or comes from an embedding through an MLP (section 3.3, "reparameterization").
"""
from mindpet_lite.delta.ptuning2.dense import Ptuning2Config, Ptuning2Dense
from mindpet_lite.delta.ptuning2.encoder import PrefixEncoder
from mindpet_lite.delta.ptuning2.prompts import PrefixEmbedding

__all__ = ["PrefixEmbedding", "PrefixEncoder", "Ptuning2Config", "Ptuning2Dense"]
