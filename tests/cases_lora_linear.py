"""The cases for the laws of LoRA on mint.nn.Linear."""
from __future__ import annotations

from cases_lora import LORA, lora_dense
from laws import Case
from mindspore import mint

from mindpet_lite.delta import LoRALinear


def linear_case(name, x_shape, **linear):
    return Case("lora", name, lambda dtype: mint.nn.Linear(6, 4, dtype=dtype, **linear),
                lambda dtype: LoRALinear(6, 4, **LORA, dtype=dtype, **linear), LORA, x_shape, lora_dense(None))


CASES = [
    linear_case("mint linear", (5, 6)),
    linear_case("mint linear without bias, 3 axes", (2, 3, 6), bias=False),
]
