"""LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, https://arxiv.org/abs/2106.09685.

    y = act(x Wᵀ + b + (alpha / rank) · drop(x) Aᵀ Bᵀ)                                             (section 4.1, eq. 3)

W and b are frozen; A (rank, in) starts random and B (out, rank) starts at zero, so training starts at the base.
On convolutions and embeddings as the authors' loralib and PEFT have it: see `LoRAConv` and `LoRATable`.
"""
from mindpet_lite.delta.lora.config import LoraConfig
from mindpet_lite.delta.lora.conv import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAMintConv1d,
    LoRAMintConv2d,
    LoRAMintConv3d,
)
from mindpet_lite.delta.lora.dense import LoRADense
from mindpet_lite.delta.lora.embedding import LoRAEmbedding, LoRAMintEmbedding
from mindpet_lite.delta.lora.linear import LoRALinear

__all__ = ["LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRADense", "LoRAEmbedding", "LoRALinear", "LoRAMintConv1d",
           "LoRAMintConv2d", "LoRAMintConv3d", "LoRAMintEmbedding", "LoraConfig"]
