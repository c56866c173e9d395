"""Measures whether drawn pictures show what was asked for: is a name's own picture the nearest of all?"""

from itertools import product
from typing import NamedTuple

import numpy as np

# Rec. 601: how bright red, green and blue look.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
CELLS = 16
SHIFT = 2


class Found(NamedTuple):
    """Of how many pictures the own target was the nearest, or one of the five nearest."""

    top1: int
    top5: int
    count: int

    def __str__(self) -> str:
        return f"{self.top1:3d} and {self.top5:3d} of {self.count}"


def blurred(images: np.ndarray) -> np.ndarray:
    """The luminance of images (n, 3, s, s) as the means of 16 x 16 cells, in rows (n, 256)."""
    n, _, side, _ = images.shape
    grey = np.einsum("nchw,c->nhw", images, LUMA)
    return grey.reshape(n, CELLS, side // CELLS, CELLS, side // CELLS).mean(axis=(2, 4)).reshape(n, -1)


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images moved by some pixels; white (1) comes in at the edges."""
    side = images.shape[-1]
    padded = np.pad(images, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), constant_values=1)
    return padded[:, :, SHIFT - down:SHIFT - down + side, SHIFT - right:SHIFT - right + side]


def distances(drawn: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Squared distance of every drawn picture to every target, (n, m), the smallest over shifts by up to 2 pixels."""
    rows = blurred(targets)
    least = np.full((len(drawn), len(targets)), np.inf)
    for down, right in product(range(-SHIFT, SHIFT + 1), repeat=2):
        moved = blurred(shifted(drawn, down, right))
        square = (moved ** 2).sum(1)[:, None] + (rows ** 2).sum(1)[None] - 2 * moved @ rows.T
        least = np.minimum(least, square)
    return least


def found(drawn: np.ndarray, targets: np.ndarray) -> Found:
    """Counts for how many of n pictures the target at the same place is the nearest, or among the five nearest.

    Args:
        drawn: Images (n, 3, s, s) in [-1, 1], s a multiple of 16.
        targets: The pictures that belong to them, of the same shape.
    """
    all_pairs = distances(drawn, targets)
    own = np.diagonal(all_pairs)
    nearer = (all_pairs < own[:, None]).sum(1)
    return Found(int((nearer < 1).sum()), int((nearer < 5).sum()), len(drawn))
