"""LN tuning's cases for the laws: norms of MindSpore, and of a user."""
from __future__ import annotations

import mindspore as ms
import numpy as np
from laws import Case
from mindspore import Tensor, nn
from nets import numbers
from peft_models import RMSNorm


def normalised(x, eps):
    """Return x̂ = (x - mean) / σ along the last axis, and the function that gives the gradient by x from that by x̂.

    dx = (g - mean(g) - x̂ mean(g x̂)) / σ.
    """
    sigma = np.sqrt(x.var(-1, keepdims=True) + eps)
    hat = (x - x.mean(-1, keepdims=True)) / sigma

    def by_x(g):
        return (g - g.mean(-1, keepdims=True) - hat * (g * hat).mean(-1, keepdims=True)) / sigma

    return hat, by_x


def layer_norm(layer, x, output_gradient):
    hat, by_x = normalised(x, 1e-7)
    gamma, rows = numbers(layer.gamma), output_gradient.reshape(-1, x.shape[-1])
    return hat * gamma + numbers(layer.beta), {
        layer.gamma: (rows * hat.reshape(rows.shape)).sum(0), layer.beta: rows.sum(0)}, by_x(output_gradient * gamma)


def group_norm(layer, x, output_gradient):
    """The same over each group of channels and its pixels, for (n, channels, h, w)."""
    grouped = (x.shape[0], layer.num_groups, -1)
    gamma, beta = (numbers(item)[None, :, None, None] for item in (layer.gamma, layer.beta))
    hat, by_x = normalised(x.reshape(grouped), layer.eps)
    hat = hat.reshape(x.shape)
    return hat * gamma + beta, {
        layer.gamma: (output_gradient * hat).sum((0, 2, 3)), layer.beta: output_gradient.sum((0, 2, 3))}, by_x(
        (output_gradient * gamma).reshape(grouped)).reshape(x.shape)


def rms_norm(layer, x, output_gradient):
    """y = x / sqrt(mean(x²) + eps) · γ."""
    root = np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    g = output_gradient * numbers(layer.weight)
    by_x = g / root - x * (g * x).mean(-1, keepdims=True) / root ** 3
    return x / root * numbers(layer.weight), {
        layer.weight: (output_gradient * x / root).reshape(-1, x.shape[-1]).sum(0)}, by_x


def wide(kind):
    return lambda dtype: moved(kind(), dtype)


def moved(norm: nn.Cell, dtype=ms.float32) -> nn.Cell:
    """Return a norm with a scale and a shift that are not those that it was made with."""
    for seed, item in enumerate(norm.get_parameters()):
        value = 1 - seed + 0.3 * np.random.default_rng(seed).standard_normal(item.shape)
        item.set_data(Tensor(value, dtype))
    return norm


def pointwise(inner, outer):
    return lambda dtype: nn.Conv2d(inner, outer, 1, has_bias=True, dtype=dtype)


def tail(dtype):
    return nn.Dense(6, 3, dtype=dtype)


LAYER = wide(lambda: nn.LayerNorm((6,), epsilon=1e-7))
GROUP = wide(lambda: nn.GroupNorm(2, 6))
CASES = [
    Case("ln_tuning", "nn.LayerNorm", LAYER, LAYER, {}, (5, 6), layer_norm, tail=tail),
    Case("ln_tuning", "nn.GroupNorm", GROUP, GROUP, {}, (2, 6, 3, 3), group_norm, head=pointwise(6, 6),
         tail=pointwise(6, 3)),
    Case("ln_tuning", "a user's RMSNorm", wide(lambda: RMSNorm(6)), wide(lambda: RMSNorm(6)), {}, (5, 6), rms_norm,
         tail=tail),
]
