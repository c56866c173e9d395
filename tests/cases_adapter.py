"""The adapter's cases for the laws."""
from __future__ import annotations

import reference_adapter as reference
from laws import Case
from mindspore import nn
from nets import numbers

from mindpet_lite.delta import AdapterDense, AdapterLayer

SETTINGS = {"bottleneck_size": 5, "non_linearity": "tanh"}


def of_layer(layer: AdapterLayer, x, upstream):
    """Return AdapterLayer's output, {parameter: gradient} and gradient by x."""
    block = layer.mindpet_delta_adapter_block
    down, up = block.mindpet_delta_adapter_down_sampler, block.mindpet_delta_adapter_up_sampler
    slope = {"slope": numbers(block.mindpet_delta_adapter_non_linear.w)} if layer.non_linearity == "prelu" else {}
    parts = (numbers(down.weight).T, numbers(down.bias), numbers(up.weight).T, numbers(up.bias), layer.non_linearity)
    found = reference.bottleneck_gradients(x, *parts, upstream, **slope)
    by = {down.weight: found["down"].T, down.bias: found["down_bias"], up.weight: found["up"].T,
          up.bias: found["up_bias"]}
    if slope:
        by[block.mindpet_delta_adapter_non_linear.w] = found["slope"].reshape(1)
    return reference.bottleneck(x, *parts, **slope), by, found["x"]


def dense_reference(of_inner, activation):
    """Return the reference of a Dense whose inner layer's is `of_inner`."""
    def compute(layer, x, upstream):
        inner: dict = {}

        def after(h):
            y, by, by_h = of_inner(layer.bottleneck, h, upstream)
            inner.update(by)
            return y, by_h

        y, found = reference.dense(x, numbers(layer.weight), numbers(layer.bias) if layer.has_bias else None,
                                   activation, after)
        own = {layer.weight: found["weight"], **({layer.bias: found["bias"]} if layer.has_bias else {})}
        return y, {**own, **inner}, found["x"]
    return compute


def dense_case(name, x_shape, settings=SETTINGS, activation=None, rounds_in_fp16=True, **dense):
    return Case("adapter", name, lambda dtype: nn.Dense(6, 4, activation=activation, dtype=dtype, **dense),
                lambda dtype: AdapterDense(6, 4, activation=activation, dtype=dtype, **settings, **dense),
                settings, x_shape, dense_reference(of_layer, activation), rounds_in_fp16)


CASES = [
    dense_case("dense", (5, 6)),
    dense_case("dense without bias, gelu, 4 axes", (2, 1, 3, 6), {"bottleneck_size": 8}, has_bias=False),
    dense_case("dense with tanh, prelu, 1 axis", (6,), {"bottleneck_size": 3, "non_linearity": "prelu"},
               activation="tanh", rounds_in_fp16=False),
    dense_case("dense with relu, softmax2d, 3 axes", (2, 3, 6), {"bottleneck_size": 3, "non_linearity": "softmax2d"},
               activation="relu"),
]
