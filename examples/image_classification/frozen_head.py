"""What features that do not change are worth: the nearest class mean, and logistic regression."""

import numpy as np

STEPS, RATE, DECAY = 500, 0.05, 1e-2
# How sure the head of means is: the difference of its scores at a class's mean, on average.
SURENESS = 4.0


def head_of_means(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest class mean as a linear layer: -t |f - m|² is 2 t m f - t |m|², and what all classes have alike.

    Args:
        features: (pictures, width).
        labels: (pictures,).
        classes: How many.

    Returns:
        W (classes, width) and b (classes,), float32.
    """
    features = features.astype(np.float64)
    centre = features.mean(0)
    means = np.stack([features[labels == label].mean(0) for label in range(classes)]) - centre
    gaps = ((means[:, None] - means[None]) ** 2).sum(-1).sum() / (classes * (classes - 1))
    t = SURENESS / max(gaps, 1e-12)
    weight = 2 * t * means
    bias = -t * (means ** 2).sum(1) - weight @ centre
    return weight.astype(np.float32), bias.astype(np.float32)


def regression(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression on features of one scale, by gradient descent with weight decay: W and b as above."""
    features = features.astype(np.float64)
    centre, scale = features.mean(0), features.std() + 1e-12
    x, one_hot = (features - centre) / scale, np.eye(classes)[labels]
    weight, bias = np.zeros((classes, x.shape[1])), np.zeros(classes)
    for _ in range(STEPS):
        scores = x @ weight.T + bias
        shares = np.exp(scores - scores.max(1, keepdims=True))
        off = (shares / shares.sum(1, keepdims=True) - one_hot) / len(x)
        weight, bias = weight - RATE * (off.T @ x + DECAY * weight), bias - RATE * off.sum(0)
    weight = weight / scale
    return weight.astype(np.float32), (bias - weight @ centre).astype(np.float32)
