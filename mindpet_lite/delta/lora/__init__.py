"""LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, https://arxiv.org/abs/2106.09685.

    y = act(x Wᵀ + b + (alpha / rank) · drop(x) Aᵀ Bᵀ)                                             (section 4.1, eq. 3)

W and b are frozen; A (rank, in) starts random and B (out, rank) starts at zero, so training starts at the base.
"""
from mindpet_lite.delta.lora.config import LoraConfig
from mindpet_lite.delta.lora.dense import LoRADense

__all__ = ["LoRADense", "LoraConfig"]
