"""The low-rank adapter's cases for the laws."""
from __future__ import annotations

import reference_adapter as reference
from cases_adapter import dense_reference
from laws import Case
from mindspore import nn
from nets import numbers

from mindpet_lite.delta import LowRankAdapterDense, LowRankAdapterLayer


def of_layer(layer: LowRankAdapterLayer, x, upstream):
    """Return LowRankAdapterLayer's output, {parameter: gradient} and gradient by x."""
    maps = {"down": layer.mindpet_delta_low_rank_adapter_down_sampler,
            "up": layer.mindpet_delta_low_rank_adapter_up_sampler}
    factors = {name: (part.mindpet_delta_low_rank_adapter_weight_left, part.mindpet_delta_low_rank_adapter_weight_right)
               for name, part in maps.items()}
    values = {name: tuple(map(numbers, pair)) for name, pair in factors.items()}
    parts = (values["down"][0] @ values["down"][1], numbers(maps["down"].bias),
             values["up"][0] @ values["up"][1], numbers(maps["up"].bias), layer.non_linearity)
    non_linear = layer.mindpet_delta_low_rank_adapter_non_linear
    slope = {"slope": numbers(non_linear.w)} if layer.non_linearity == "prelu" else {}
    found = reference.bottleneck_gradients(x, *parts, upstream, **slope)
    by = {non_linear.w: found["slope"].reshape(1)} if slope else {}
    for name, (left, right) in factors.items():
        by[left] = found[name] @ values[name][1].T
        by[right] = values[name][0].T @ found[name]
        by[maps[name].bias] = found[f"{name}_bias"]
    return reference.bottleneck(x, *parts, **slope), by, found["x"]


def dense_case(name, x_shape, activation=None, rounds_in_fp16=True, has_bias=True, **settings):
    return Case("low_rank_adapter", name,
                lambda dtype: nn.Dense(6, 8, activation=activation, has_bias=has_bias, dtype=dtype),
                lambda dtype: LowRankAdapterDense(6, 8, activation=activation, has_bias=has_bias, dtype=dtype,
                                                  **settings),
                settings, x_shape, dense_reference(of_layer, activation), rounds_in_fp16,
                tail=lambda dtype: nn.Dense(8, 3, dtype=dtype))


CASES = [
    dense_case("dense", (5, 6), reduction_factor=2, low_rank_size=2, non_linearity="tanh"),
    dense_case("dense without bias, gelu, 4 axes", (2, 1, 3, 6), has_bias=False, reduction_factor=3),
    dense_case("dense with tanh, 1 axis", (6,), activation="tanh", rounds_in_fp16=False, low_rank_size=3,
               low_rank_w_init="normal"),
]
