"""LoRADense in numpy and float64, written from the formula, independent of the package."""
from __future__ import annotations

import numpy as np

# Each activation and its derivative by the input.
ACTIVATIONS = {
    None: (lambda z: z, lambda z: np.ones_like(z)),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(np.float64)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
}


def _pre_activation(x, weight, bias, a, b, scale):
    z = np.einsum("...i,oi->...o", x, weight)
    if bias is not None:
        z = z + bias
    return z + scale * np.einsum("...i,ri,or->...o", x, a, b)


def forward(x, weight, bias, a, b, scale, activation=None):
    """Return act(x Wᵀ + b + scale · x Aᵀ Bᵀ)."""
    x, weight, a, b = (np.asarray(item, np.float64) for item in (x, weight, a, b))
    return ACTIVATIONS[activation][0](_pre_activation(x, weight, bias, a, b, scale))


def gradients(x, weight, bias, a, b, scale, output_gradient, activation=None):
    """Return the gradients of sum(y · output_gradient) by x, weight, bias, a and b."""
    x, weight, a, b, upstream = (np.asarray(item, np.float64) for item in (x, weight, a, b, output_gradient))
    upstream = upstream * ACTIVATIONS[activation][1](_pre_activation(x, weight, bias, a, b, scale))
    rows_x, rows_g = x.reshape(-1, x.shape[-1]), upstream.reshape(-1, upstream.shape[-1])
    effective = weight + scale * b @ a
    return {
        "x": (rows_g @ effective).reshape(x.shape),
        "weight": rows_g.T @ rows_x,
        "bias": rows_g.sum(0),
        "a": scale * b.T @ rows_g.T @ rows_x,
        "b": scale * rows_g.T @ rows_x @ a.T,
    }
