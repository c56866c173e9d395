"""Round a weight so that what its layer gives changes least: GPTQ, in numpy.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
https://arxiv.org/abs/2210.17323, section 3 and algorithm 1; the order of the columns is that of its authors' code.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

# What is added to the diagonal of Xᵀ X, over its mean, and columns that are rounded before all others follow (3.3).
DAMPING, AT_ONCE = 0.01, 128


def compensated(weight: np.ndarray, scale: np.ndarray, nearest: Callable[[np.ndarray], np.ndarray], gram: np.ndarray
                ) -> np.ndarray:
    """Return the rounded weight over its scale.

    It seeks the smallest |(W - Ŵ) Xᵀ|² for rows X that the layer was given. One column of W after the other is rounded,
    that of the largest inputs first; what it lost is made good by the columns that are not rounded yet:

        W[:, j] -= (W[:, i] - Ŵ[:, i]) / U[i, i] · U[i, j]   for j after i, with Uᵀ U = (Xᵀ X + damping)⁻¹

    Args:
        weight: (outputs, inputs).
        scale: (outputs, inputs), of each number, 0 where all that it scales are.
        nearest: gives for numbers over their scale the nearest that a code means, in the same shape.
        gram: Xᵀ X (inputs, inputs).
    """
    sizes = np.diag(gram).astype(np.float64)
    order = np.argsort(-sizes, kind="stable")
    own, each = weight[:, order].astype(np.float64), scale[:, order].astype(np.float64)
    upper = _upper(gram[np.ix_(order, order)].astype(np.float64))
    found = np.empty(own.shape)
    for first in range(0, len(order), AT_ONCE):
        last = min(first + AT_ONCE, len(order))
        lost = np.empty((len(own), last - first))
        for i in range(first, last):
            found[:, i] = nearest(own[:, i] / np.where(each[:, i] == 0, 1, each[:, i]))
            lost[:, i - first] = (own[:, i] - found[:, i] * each[:, i]) / upper[i, i]
            own[:, i + 1:last] -= np.outer(lost[:, i - first], upper[i, i + 1:last])
        own[:, last:] -= lost @ upper[first:last, last:]
    back = np.empty(weight.shape, np.float32)
    back[:, order] = found
    return back


def _upper(gram: np.ndarray) -> np.ndarray:
    """Return the upper triangle U with Uᵀ U = (Xᵀ X + damping)⁻¹."""
    # A layer that was given zeros alone is rounded to the nearest.
    damping = DAMPING * float(np.diag(gram).mean()) or 1.0
    return np.linalg.cholesky(np.linalg.inv(gram + damping * np.eye(len(gram)))).T
