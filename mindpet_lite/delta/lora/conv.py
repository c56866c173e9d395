"""LoRA on the convolutions of `mindspore.nn` and `mindspore.mint.nn`."""
from __future__ import annotations

from typing import Any

import mindspore

from mindpet_lite.delta.hosts import require_float
from mindpet_lite.delta.hosts.conv import (
    Conv1dHost,
    Conv2dHost,
    Conv3dHost,
    MintConv1dHost,
    MintConv2dHost,
    MintConv3dHost,
)
from mindpet_lite.delta.lora.low_rank import LowRank
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.starting import HE_UNIFORM


class LoRAConv(LowRank):
    r"""A convolution with a trainable low-rank update beside its frozen kernel: what all kinds share.

    $$
    y = W * x + b + \frac{\alpha}{r} B * (A * drop(x))
    $$

    A is a convolution to `lora_rank` channels with the kernel size, stride, padding and dilation of the layer, B one
    of kernel size 1: `mindpet_delta_lora_a` (lora_rank, in_channels, *kernel) and `mindpet_delta_lora_b`
    (out_channels, lora_rank / group, 1, ...), as PEFT has them. With the scaling `scaling` (), see
    `LoRADense`, where the dtype rule stands too.

    With ``group > 1``, A sees all channels and B has the groups, as in PEFT: output group g is made of the g-th
    part of the `lora_rank` channels. An output then depends on every input channel, which no kernel of the grouped
    layer can express: `merge` refuses such a layer. (DoRA takes the norm as PEFT does, which lays B A over the
    kernel.) `lora_rank` must be divisible by `group`.

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; for convolutions the authors' loralib, and PEFT.

    Args:
        in_channels (int): channels of the input; positive.
        out_channels (int): channels of the output; positive.
        kernel_size (int | tuple[int]): positive, as the plain layer takes it.
        lora_rank (int): channels between A and B; positive, divisible by the number of groups.
        lora_alpha (int | float): finite and positive; the update is scaled by lora_alpha / lora_rank.
        lora_dropout (int | float): probability in [0, 1) of dropping an input of A in training. Default: 0.0.
        lora_a_init (Tensor | str | Initializer | number): start of A. Default: He-uniform with negative slope √5.
        lora_b_init (Tensor | str | Initializer | number): start of B. Default: zeros, so that the layer starts equal
            to its base.
        param_init_type (mindspore.dtype): type of A and B: float16, bfloat16 or float32. Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.
        use_rslora (bool): scale by lora_alpha / √lora_rank instead. Default: False.
        lora_bias (bool): B has a bias of its own. Default: False.
        **conv_kwargs: the other arguments of the plain layer. Default: the plain layer's.

    Inputs:
        - **x** (Tensor): as the plain layer takes it.

    Outputs:
        Tensor of the plain layer's shape, and of the type that the dtype rule says.

    Raises:
        TypeError: as `LoRADense` and the plain layer.
        ValueError: as `LoRADense` and the plain layer; lora_rank is not divisible by the number of groups; the
            layout is not channels first.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], lora_rank: int,
                 lora_alpha: float, lora_dropout: float = 0.0, lora_a_init: Any = HE_UNIFORM,
                 lora_b_init: Any = "zeros", param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, use_rslora: bool = False,
                 lora_bias: bool = False, **conv_kwargs: Any) -> None:
        settings = LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                                compute_dtype, use_rslora, lora_bias=lora_bias)
        super().__init__(in_channels, out_channels, kernel_size, **conv_kwargs)
        require_float(self.weight, type(self))
        self._add_delta(settings)


class LoRAConv1d(LoRAConv, Conv1dHost):
    """LoRA on `nn.Conv1d`; see `LoRAConv`. `weight` is (out_channels, in_channels / group, 1, kernel_size).

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.LoRAConv1d(3, 4, kernel_size=5, lora_rank=2, lora_alpha=4)
        >>> layer(Tensor(np.ones((1, 3, 8), np.float32))).shape
        (1, 4, 8)
        >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
        ((2, 3, 5), (4, 2, 1))
    """


class LoRAConv2d(LoRAConv, Conv2dHost):
    """LoRA on `nn.Conv2d`; see `LoRAConv`.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.LoRAConv2d(3, 4, kernel_size=3, lora_rank=2, lora_alpha=4, pad_mode="same")
        >>> layer(Tensor(np.ones((1, 3, 8, 8), np.float32))).shape
        (1, 4, 8, 8)
        >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
        ((2, 3, 3, 3), (4, 2, 1, 1))
    """


class LoRAConv3d(LoRAConv, Conv3dHost):
    """LoRA on `nn.Conv3d`; see `LoRAConv`.

    Examples:
        >>> import mindpet_lite as mp
        >>> layer = mp.LoRAConv3d(3, 4, kernel_size=3, lora_rank=2, lora_alpha=4)
        >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
        ((2, 3, 3, 3, 3), (4, 2, 1, 1, 1))
    """


class LoRAMintConv1d(LoRAConv, MintConv1dHost):
    """LoRA on `mint.nn.Conv1d`; see `LoRAConv`.

    Examples:
        >>> import mindpet_lite as mp
        >>> layer = mp.LoRAMintConv1d(3, 4, kernel_size=5, lora_rank=2, lora_alpha=4)
        >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
        ((2, 3, 5), (4, 2, 1))
    """


class LoRAMintConv2d(LoRAConv, MintConv2dHost):
    """LoRA on `mint.nn.Conv2d`; see `LoRAConv`.

    Examples:
        >>> import mindpet_lite as mp
        >>> layer = mp.LoRAMintConv2d(4, 4, kernel_size=3, lora_rank=2, lora_alpha=4, groups=2)
        >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
        ((2, 4, 3, 3), (4, 1, 1, 1))
    """


class LoRAMintConv3d(LoRAConv, MintConv3dHost):
    """LoRA on `mint.nn.Conv3d`; see `LoRAConv`.

    Examples:
        >>> import mindpet_lite as mp
        >>> layer = mp.LoRAMintConv3d(3, 4, kernel_size=3, lora_rank=2, lora_alpha=4)
        >>> layer.mindpet_delta_lora_a.shape, layer.mindpet_delta_lora_b.shape
        ((2, 3, 3, 3, 3), (4, 2, 1, 1, 1))
    """
