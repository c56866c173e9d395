"""LoRA on `mindspore.mint.nn.Linear`."""
from __future__ import annotations

from typing import Any

import mindspore

from mindpet_lite.delta.hosts import require_float
from mindpet_lite.delta.hosts.linear import LinearHost
from mindpet_lite.delta.lora.low_rank import LowRank
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.starting import HE_UNIFORM


class LoRALinear(LowRank, LinearHost):
    r"""LoRA on `mint.nn.Linear`: `LoRADense` without an activation, on the operator of that layer.

    $$
    y = x W^T + b + \frac{\alpha}{r} drop(x) A^T B^T
    $$

    Names, shapes, dtype rule and errors are those of `LoRADense`, and so are the arguments from `lora_rank` on.

    Args:
        in_features (int): size of the last axis of the input; positive.
        out_features (int): size of the last axis of the output; positive.
        lora_rank (int): rows of A, columns of B; positive. Above min(in, out) a warning says that it is wasted.
        lora_alpha (int | float): finite and positive; the update is scaled by lora_alpha / lora_rank.
        lora_dropout (int | float): probability in [0, 1) of dropping an input of A in training. Default: 0.0.
        lora_a_init (Tensor | str | Initializer | number): start of A. Default: He-uniform with negative slope √5.
        lora_b_init (Tensor | str | Initializer | number): start of B. Default: zeros, so that the layer starts equal to
            its base.
        param_init_type (mindspore.dtype): type of A and B: float16, bfloat16 or float32. Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule of `LoRADense`. Default: None.
        use_rslora (bool): scale by lora_alpha / √lora_rank instead. Default: False.
        lora_bias (bool): B has a bias of its own. Default: False.
        **linear_kwargs: bias, weight_init, bias_init and dtype of mint.nn.Linear.

    Inputs:
        - **x** (Tensor): `(*, in_features)`.

    Outputs:
        Tensor `(*, out_features)`, of the type that the dtype rule says.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.LoRALinear(4, 3, lora_rank=2, lora_alpha=4)
        >>> layer(Tensor(np.ones((5, 4), np.float32))).shape
        (5, 3)
    """

    def __init__(self, in_features: int, out_features: int, lora_rank: int, lora_alpha: float,
                 lora_dropout: float = 0.0, lora_a_init: Any = HE_UNIFORM, lora_b_init: Any = "zeros",
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, use_rslora: bool = False,
                 lora_bias: bool = False, **linear_kwargs: Any) -> None:
        settings = LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                                compute_dtype, use_rslora, lora_bias=lora_bias)
        super().__init__(in_features, out_features, **linear_kwargs)
        require_float(self.weight, type(self))
        self._add_delta(settings)
