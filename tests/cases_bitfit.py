"""BitFit's cases for the laws."""
from __future__ import annotations

import numpy as np
from laws import Case
from mindspore import nn
from nets import numbers


def dense(layer, x, output_gradient):
    """y = x Wᵀ + b: the gradient by b is the sum of the output gradient over all rows."""
    y = x @ numbers(layer.weight).T + numbers(layer.bias)
    rows = output_gradient.reshape(-1, output_gradient.shape[-1])
    return y, {layer.bias: rows.sum(0), layer.weight: rows.T @ x.reshape(-1, x.shape[-1])}, \
        output_gradient @ numbers(layer.weight)


def conv_1x1(layer, x, output_gradient):
    """The same at every pixel."""
    weight = numbers(layer.weight)[:, :, 0, 0]
    y = np.einsum("nchw,oc->nohw", x, weight) + numbers(layer.bias)[None, :, None, None]
    return y, {layer.bias: output_gradient.sum((0, 2, 3))}, np.einsum("nohw,oc->nchw", output_gradient, weight)


def pointwise(inner, outer):
    return lambda dtype: nn.Conv2d(inner, outer, 1, has_bias=True, dtype=dtype)


CASES = [
    Case("bitfit", "dense", lambda dtype: nn.Dense(6, 4, dtype=dtype), lambda dtype: nn.Dense(6, 4, dtype=dtype), {},
         (5, 6), dense),
    Case("bitfit", "convolution", pointwise(6, 4), pointwise(6, 4), {}, (2, 6, 3, 3), conv_1x1,
         head=pointwise(6, 6), tail=pointwise(4, 3)),
]
