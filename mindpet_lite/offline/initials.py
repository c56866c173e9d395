"""What initialisations take out of the base before training: the adapter's update is on what they left."""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from mindpet_lite.formats.starts import RESIDUAL_STARTS

Taken = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def residual_of(start: str | None, rank: int, scale: float, outputs_in_rows: bool) -> Taken | None:
    """Return what gives the part of a weight that a start takes out of it, as two factors L R; None without one.

    Args:
        start: of those that only depend on the base: "pissa" or "olora".
        rank: of the adapter.
        scale: s of s · B A.
        outputs_in_rows: as in `changes.LowRank`.

    Raises:
        ValueError: it is another start.
    """
    if start is None:
        return None
    if start not in RESIDUAL_STARTS:
        raise ValueError(f"init_lora_weights must be one of {', '.join(RESIDUAL_STARTS)} or plain, but the file says "
                         f"{start!r}.")
    taken = _pissa if start == "pissa" else functools.partial(_olora, scale=scale)

    def of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = weight.astype(np.float64)
        left, right = taken(weight if outputs_in_rows else weight.T, rank)
        left, right = (left, right) if outputs_in_rows else (right.T, left.T)
        return left.astype(np.float32), right.astype(np.float32)
    return of


def _pissa(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """PiSSA, Meng et al., 2024, https://arxiv.org/abs/2404.02948: the part of the largest singular values."""
    u, sizes, v = np.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * sizes[:rank], v[:rank]


def _olora(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """OLoRA, Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775: the first columns of Q times rows of R, scaled."""
    q, r = np.linalg.qr(weight)
    return scale * q[:, :rank], r[:rank]
