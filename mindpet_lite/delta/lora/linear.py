"""LoRA on `mindspore.mint.nn.Linear`."""
from __future__ import annotations

from typing import Any

import mindspore
from mindspore import Tensor, nn

from mindpet_lite.delta.dense import require_float
from mindpet_lite.delta.lora.layer import LoRALayer
from mindpet_lite.delta.lora.low_rank import HE_UNIFORM
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.typed import TypedLinear
from mindpet_lite.delta.parts import as_type


class LoRALinear(LoRALayer, TypedLinear):
    r"""LoRA on `mint.nn.Linear`: :class:`LoRADense` without an activation, on the operator of that layer.

    .. math:: y = x W^T + b + \frac{\alpha}{r} drop(x) A^T B^T

    Names, shapes, dtype rule and errors are those of :class:`LoRADense`, and so are the arguments from `lora_rank` on.

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

    @classmethod
    def factor_shapes(cls, layer: nn.Cell, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B."""
        return (rank, layer.in_features), (layer.out_features, rank)

    def _add_delta(self, config: LoraSettings) -> None:
        self.compute_dtype = config.compute_dtype
        self._add_factors(config, self.weight, min(self.in_features, self.out_features))
        self._add_dropout()

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, in_features); return (*, out_features)."""
        output_type, dtype = self._output_type(x), self._compute_type()
        x = self._entered(x, dtype)
        y = self._base(x, dtype)
        if self.has_dropout:
            x = self.lora_dropout(x)
        low = self._scaled(self.dense(x, as_type(self.mindpet_delta_lora_a, dtype)), dtype)
        update = self.dense(low, as_type(self.mindpet_delta_lora_b, dtype))
        if self.has_lora_bias:
            update = update + self._scaled_bias(dtype)
        if self.use_dora:
            update = self._dora(self._linear(x, dtype), update, dtype)
        return as_type(y + update, output_type)
