"""Both adapters and the 25 activations in numpy and float64, written from the formulas, independent of the package."""
from __future__ import annotations

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z, axis=-1):
    powers = np.exp(z - z.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


# In evaluation RReLU's slope is the mean of what it draws in training, from 1/8 to 1/3.
RRELU_MEAN = (1 / 8 + 1 / 3) / 2
ELEMENTWISE = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "relu6": lambda z: np.clip(z, 0, 6),
    "rrelu": lambda z: np.where(z > 0, z, RRELU_MEAN * z),
    "silu": lambda z: z * sigmoid(z),
    "tanh": np.tanh,
    "tanhshrink": lambda z: z - np.tanh(z),
    "hardtanh": lambda z: np.clip(z, -1, 1),
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z ** 3))),
    "fast_gelu": lambda z: z * sigmoid(1.702 * z),
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "sigmoid": sigmoid,
    "softsign": lambda z: z / (1 + np.abs(z)),
    "leakyrelu": lambda z: np.where(z > 0, z, 0.2 * z),
    "hswish": lambda z: z * np.clip(z + 3, 0, 6) / 6,
    "hsigmoid": lambda z: np.clip(z + 3, 0, 6) / 6,
    "logsigmoid": lambda z: -np.log1p(np.exp(-z)),
    "softshrink": lambda z: np.sign(z) * np.maximum(np.abs(z) - 0.5, 0),
    "hshrink": lambda z: np.where(np.abs(z) > 0.5, z, 0),
    "threshold": lambda z: np.where(z > 0, z, 0),
    "mish": lambda z: z * np.tanh(np.log1p(np.exp(z))),
}
# The axis that is normalised, and the sign of what is.
NORMALISED = {"softmax": (-1, 1), "softmin": (-1, -1), "softmax2d": (-3, 1)}


def activate(name, z, slope=0.25):
    """Return the activation of `z`; `slope` is PReLU's."""
    if name in NORMALISED:
        axis, sign = NORMALISED[name]
        return softmax(sign * z, axis)
    if name == "logsoftmax":
        return np.log(softmax(z))
    if name == "prelu":
        return np.where(z > 0, z, slope * z)
    return ELEMENTWISE[name](z)


def pull_back(name, z, upstream, slope=0.25):
    """Return the gradient of sum(activate(z) · upstream) by `z`."""
    if name in NORMALISED:
        axis, sign = NORMALISED[name]
        y = softmax(sign * z, axis)
        return sign * y * (upstream - (upstream * y).sum(axis, keepdims=True))
    if name == "logsoftmax":
        return upstream - softmax(z) * upstream.sum(-1, keepdims=True)
    step = 1e-5
    return upstream * (activate(name, z + step, slope) - activate(name, z - step, slope)) / (2 * step)


def bottleneck(x, down, down_bias, up, up_bias, non_linearity, scale=1.0, slope=0.25):
    """Return x + scale · (act(x down + down_bias) up + up_bias), for maps [in, out]."""
    return x + scale * (activate(non_linearity, x @ down + down_bias, slope) @ up + up_bias)


def bottleneck_gradients(x, down, down_bias, up, up_bias, non_linearity, upstream, slope=0.25):
    """Return the gradients of sum(y · upstream), for the strength 1, by the arguments and by the slope."""
    z = x @ down + down_bias
    low = activate(non_linearity, z, slope)
    by_low = upstream @ up.T
    by_z = pull_back(non_linearity, z, by_low, slope)
    rows = lambda value: value.reshape(-1, value.shape[-1])  # noqa: E731
    return {"x": upstream + by_z @ down.T, "down": rows(x).T @ rows(by_z), "down_bias": rows(by_z).sum(0),
            "up": rows(low).T @ rows(upstream), "up_bias": rows(upstream).sum(0),
            "slope": (by_low * z * (z < 0)).sum()}


def dense(x, weight, bias, activation, after):
    """Return y and the gradients by x, weight and bias of sum(y · upstream), y = after(act(x weightᵀ + bias)).

    `after` maps h to y and the gradient by h.
    """
    z = x @ weight.T + (0 if bias is None else bias)
    y, by_h = after(activate(activation, z))
    by_z = pull_back(activation, z, by_h)
    flat = by_z.reshape(-1, by_z.shape[-1])
    return y, {"x": by_z @ weight, "weight": flat.T @ x.reshape(-1, x.shape[-1]), "bias": flat.sum(0)}
