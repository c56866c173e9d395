"""Logistic regression on features that do not change: what a frozen encoder is worth with a linear head."""

import numpy as np
from scipy.optimize import minimize


def fit_head(features: np.ndarray, labels: np.ndarray, count: int, strength: float = 1.0
             ) -> tuple[np.ndarray, np.ndarray]:
    """Minimises the sum of the cross-entropies and ||W||² / (2 strength), with float64 arithmetic.

    Args:
        features: (rows, width).
        labels: (rows,), from 0.
        count: How many labels there are.
        strength: Larger is less regularised.

    Returns:
        W (count, width) and b (count,), float32.
    """
    x, one_hot = features.astype(np.float64), np.eye(count)[labels]
    width = x.shape[1]

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = values[:-count].reshape(count, width), values[-count:]
        scores = x @ weight.T + bias
        scores -= scores.max(1, keepdims=True)
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        off = np.exp(logs) - one_hot
        value = -(logs * one_hot).sum() + (weight ** 2).sum() / (2 * strength)
        return value, np.concatenate([(off.T @ x + weight / strength).reshape(-1), off.sum(0)])

    found = minimize(loss, np.zeros(count * (width + 1)), jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    return found[:-count].reshape(count, width).astype(np.float32), found[-count:].astype(np.float32)
