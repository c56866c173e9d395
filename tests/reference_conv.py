"""Convolutions with LoRA in numpy and float64, written from the formula, independent of the package."""
from __future__ import annotations

import itertools
import math

import numpy as np


def padding_of(space, kernel, stride, dilation, pad_mode, padding):
    """Return (before, after) for each axis of the input, as nn.Conv1d to nn.Conv3d pad it."""
    if pad_mode == "valid":
        return [(0, 0)] * len(space)
    if pad_mode == "pad":
        both = (padding,) * 2 * len(space) if isinstance(padding, int) else padding
        return list(zip(both[::2], both[1::2]))
    found = []
    for size, k, s, d in zip(space, kernel, stride, dilation):
        total = max((math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0)
        found.append((total // 2, total - total // 2))
    return found


class Convolution:
    """A convolution of `x` (batch, channels, *space) with kernels (out, channels, *kernel), without groups."""

    def __init__(self, x, kernel, stride, dilation, pads):
        self.x, self.kernel, self.pads = x, kernel, pads
        self.padded = np.pad(x, [(0, 0), (0, 0), *pads])
        self.space = [(size - d * (k - 1) - 1) // s + 1
                      for size, k, s, d in zip(self.padded.shape[2:], kernel, stride, dilation)]
        self.windows = {at: tuple(slice(a * d, a * d + (n - 1) * s + 1, s)
                                  for a, n, s, d in zip(at, self.space, stride, dilation))
                        for at in itertools.product(*map(range, kernel))}

    def forward(self, weight):
        """Return y (batch, out, *space)."""
        return sum(np.einsum("nc...,oc->no...", self.padded[(slice(None), slice(None), *window)],
                             weight[(slice(None), slice(None), *at)]) for at, window in self.windows.items())

    def by_weight(self, gradient):
        """Return the gradient of sum(y · gradient) by the weight."""
        flat = gradient.reshape(*gradient.shape[:2], -1)
        found = np.zeros((gradient.shape[1], self.x.shape[1], *self.kernel))
        for at, window in self.windows.items():
            part = self.padded[(slice(None), slice(None), *window)].reshape(*self.x.shape[:2], -1)
            found[(slice(None), slice(None), *at)] = np.einsum("nos,ncs->oc", flat, part)
        return found

    def by_x(self, weight, gradient):
        """Return the gradient of sum(y · gradient) by x."""
        found = np.zeros_like(self.padded)
        for at, window in self.windows.items():
            found[(slice(None), slice(None), *window)] += np.einsum(
                "no...,oc->nc...", gradient, weight[(slice(None), slice(None), *at)])
        return found[(slice(None), slice(None), *(slice(before, before + size) for (before, _), size
                                                  in zip(self.pads, self.x.shape[2:])))]


def without_groups(weight, groups, channels):
    """Return the kernels of a grouped convolution over all `channels`: zero outside the group."""
    full = np.zeros((weight.shape[0], channels, *weight.shape[2:]))
    rows, columns = weight.shape[0] // groups, channels // groups
    for group in range(groups):
        block = slice(group * rows, (group + 1) * rows)
        full[block, group * columns:(group + 1) * columns] = weight[block]
    return full


def group_blocks(full, groups):
    """Return of kernels over all channels those inside the groups: what `without_groups` made of a weight."""
    rows, columns = full.shape[0] // groups, full.shape[1] // groups
    return np.concatenate([full[group * rows:(group + 1) * rows, group * columns:(group + 1) * columns]
                           for group in range(groups)])


def lora(convolution, weight, bias, a, b, scale, groups, gradient):
    """Return y = W * x + bias + scale · B * (A * x), and its gradients for sum(y · gradient).

    Args:
        convolution: of the input, with the layer's kernel size, stride, dilation and padding.
        weight: (out, in / groups, *kernel), `groups` groups.
        bias: (out,) or None.
        a: (rank, in, *kernel), without groups.
        b: (out, rank / groups, 1, ...), `groups` groups.
        scale: the live factor.
        groups: of the layer.
        gradient: of the output.
    """
    rank, channels = a.shape[:2]
    full = without_groups(weight, groups, channels)
    mixing = without_groups(b.reshape(len(b), -1), groups, rank)
    rows = a.reshape(rank, -1)
    effective = full + scale * (mixing @ rows).reshape(full.shape)
    y = convolution.forward(effective)
    if bias is not None:
        y = y + bias.reshape(1, -1, *[1] * (y.ndim - 2))
    by_effective = convolution.by_weight(gradient)
    flat = by_effective.reshape(len(full), -1)
    return y, {
        "x": convolution.by_x(effective, gradient),
        "weight": group_blocks(by_effective, groups),
        "bias": gradient.sum((0, *range(2, gradient.ndim))),
        "a": scale * (mixing.T @ flat).reshape(a.shape),
        "b": scale * group_blocks(flat @ rows.T, groups).reshape(b.shape),
    }
