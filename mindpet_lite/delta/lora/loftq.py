"""LoftQ: LoRA-fine-tuning-aware quantization, Li et al., 2023, https://arxiv.org/abs/2310.08659.

Q + s · B A comes near to W, where Q is quantised: in turns Q = q(W - s · B A), and s · B A = the part of the `rank`
largest singular values of W - Q.                                                               (section 3.2, alg. 1)
"""
from __future__ import annotations

import dataclasses

import numpy as np

from mindpet_lite.arguments import check_int

# The 16 values of NormalFloat with 4 bits: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, appendix E.
_NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                 -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                 0.7229568362236023, 1.0])
_BLOCK = 64
_BITS = (4, 8)


@dataclasses.dataclass(frozen=True)
class LoftQConfig:
    """Settings of LoftQ, by PEFT's names.

    Args:
        loftq_bits: 4: NormalFloat (NF4) with a scale for each 64 values; 8: whole numbers with a scale for each output.
        loftq_iter: how many turns; 1 or more.

    Raises:
        TypeError, ValueError: a value is of another type or range.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in _BITS or isinstance(self.loftq_bits, bool):
            raise ValueError(f"loftq_config loftq_bits must be 4 or 8, but got {self.loftq_bits!r:.100}.")
        check_int("loftq_config loftq_iter", self.loftq_iter)

    def decompose(self, weight: np.ndarray, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return A (rank, in), B (out, rank) and the values (out, in) of Q.

        Args:
            weight: W (out, in).
            rank: of the update, at most the smaller of the two.
            scaling: what B A is multiplied with.
        """
        weight = weight.astype(np.float64)
        product = np.zeros_like(weight)
        quantised = nearest_nf4 if self.loftq_bits == 4 else nearest_int8
        for _ in range(self.loftq_iter):
            left = quantised(weight - product)
            u, s, vt = np.linalg.svd(weight - left, full_matrices=False)
            product = u[:, :rank] * s[:rank] @ vt[:rank]
        root = np.sqrt(s[:rank] / scaling)
        return root[:, None] * vt[:rank], u[:, :rank] * root, left


def nearest_nf4(weight: np.ndarray) -> np.ndarray:
    """Return what NF4 makes of a weight, as numbers: of each 64 of its values the nearest in 16 times the largest."""
    flat = weight.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % _BLOCK)).reshape(-1, _BLOCK)
    largest = np.abs(blocks).max(1, keepdims=True)
    scaled = blocks / np.where(largest == 0, 1, largest)
    # Between two neighbours the nearer one; in the middle the lower one.
    places = np.searchsorted((_NF4[1:] + _NF4[:-1]) / 2, scaled)
    return (_NF4[places] * largest).reshape(-1)[:len(flat)].reshape(weight.shape)


def nearest_int8(weight: np.ndarray) -> np.ndarray:
    """Return what whole numbers from -127 to 127 times a scale for each row make of a weight (out, in)."""
    scale = np.abs(weight).max(1, keepdims=True) / 127
    return np.rint(weight / np.where(scale == 0, 1, scale)) * scale
