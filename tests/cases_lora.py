"""LoRA's cases for the laws."""
from __future__ import annotations

import reference
from laws import Case
from mindspore import nn
from nets import numbers

from mindpet_lite.delta import LoRADense

LORA = {"lora_rank": 3, "lora_alpha": 5}


def lora_dense(activation):
    def compute(layer, x, output_gradient):
        parts = (numbers(layer.weight), numbers(layer.bias) if layer.has_bias else None,
                 numbers(layer.mindpet_delta_lora_a), numbers(layer.mindpet_delta_lora_b))
        found = reference.gradients(x, *parts, 5 / 3, output_gradient, activation)
        by = {layer.weight: found["weight"], layer.mindpet_delta_lora_a: found["a"],
              layer.mindpet_delta_lora_b: found["b"]}
        if layer.has_bias:
            by[layer.bias] = found["bias"]
        return reference.forward(x, *parts, 5 / 3, activation), by, found["x"]
    return compute


def dense_case(name, x_shape, activation=None, rounds_in_fp16=True, **dense):
    return Case("lora", name, lambda dtype: nn.Dense(6, 4, activation=activation, dtype=dtype, **dense),
                lambda dtype: LoRADense(6, 4, **LORA, activation=activation, dtype=dtype, **dense),
                LORA, x_shape, lora_dense(activation), rounds_in_fp16)


CASES = [
    dense_case("dense", (5, 6)),
    dense_case("dense without bias, 4 axes", (2, 1, 3, 6), has_bias=False),
    dense_case("dense with tanh, 1 axis", (6,), activation="tanh", rounds_in_fp16=False),
    dense_case("dense with relu, 3 axes", (2, 3, 6), activation="relu"),
]
