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
        in_features (int): size of the last axis of the input.
        out_features (int): size of the last axis of the output.
        **linear_kwargs: bias, weight_init, bias_init and dtype of mint.nn.Linear.

    Inputs:
        - **x** (Tensor): `(*, in_features)`.

    Outputs:
        Tensor `(*, out_features)`, of the type that the dtype rule says.
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
