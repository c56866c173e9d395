"""How LoRA's factors start, besides by MindSpore's initialisers: by PEFT's names of `init_lora_weights`."""
from __future__ import annotations

import re

import numpy as np

from mindpet_lite.delta.lora.loftq import LoftQConfig
from mindpet_lite.formats.starts import RESIDUAL_STARTS, loses_base, takes_from_base

# Those that `initialize_from_data` makes.
DATA_STARTS = ("eva", "corda")
_NAMES = (True, False, "gaussian", "orthogonal", *RESIDUAL_STARTS, "pissa_niter_4", "loftq", *DATA_STARTS)
_FAST_PISSA = re.compile(r"pissa_niter_(\d{1,3})")
# Random directions beside the rank, in which a fast decomposition looks (Halko et al., section 4.2: 5 or 10).
_MORE = 10


def check_start(value: object, of_residual_base: bool) -> None:
    """Raise ValueError unless `value` is a start that we have.

    Args:
        value: of `init_lora_weights`.
        of_residual_base: the start is an adapter's past: nothing is to be made.
    """
    if of_residual_base:
        if not takes_from_base(value):
            raise ValueError(f"residual_base says that the start took a part out of the base's weights, which "
                             f"init_lora_weights {value!r:.100} does not: leave it out.")
        return
    if not any(value is item or isinstance(item, str) and value == item for item in _NAMES) and not (
            isinstance(value, str) and _FAST_PISSA.fullmatch(value)):
        known = ", ".join(map(str, _NAMES))
        raise ValueError(f"init_lora_weights must be one of {known} (with any number of iterations), but got "
                         f"{value!r:.100}." + (" (LoRA-GA, which needs gradients, is not made here.)"
                                               if loses_base(value) else ""))


def check_rank(start: object, shape: tuple[int, ...], rank: int) -> None:
    """Raise ValueError where a start takes more directions of a weight than it has."""
    if rank > min(shape):
        raise ValueError(f"init_lora_weights {start!r} takes lora_rank {rank} of a weight of rank {min(shape)} at "
                         f"most: take a lower rank.")


def factors(start: str, weight: np.ndarray, rank: int, scaling: float, loftq: LoftQConfig | None = None
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the factors A (rank, in) and B (out, rank) with which LoRA on `weight` (out, in) starts.

    And what the weight becomes, where that is not what B A leaves of it.

    - gaussian: A normal with deviation 1 / rank, B zero (Hu et al., 2021).
    - orthogonal: A and B random, their rows and columns from the odd and even rows of one orthogonal matrix, so that
      B A is zero and neither is (PEFT's "orthogonal"). The rank must be even.
    - pissa: the `rank` largest singular values and vectors of the weight, shared between A and B (PiSSA, Meng et al.,
      2024, https://arxiv.org/abs/2404.02948, eq. 2 to 4).
    - pissa_niter_N: the same from a fast decomposition with N iterations (section 4 there), see `fast_svd`.
    - olora: the first `rank` columns of Q and rows of R of the weight's QR decomposition (OLoRA, Büyükakyüz, 2024,
      https://arxiv.org/abs/2406.01775, section 3).
    - loftq: see `loftq.LoftQConfig`.

    Args:
        start: its name.
        weight: of the base, in float32.
        rank: of the update.
        scaling: what B A is multiplied with.
        loftq: the settings of LoftQ.

    Raises:
        ValueError: the rank does not go with the start.
    """
    out, inner = weight.shape
    if start == "gaussian":
        return np.random.standard_normal((rank, inner)) / rank, np.zeros((out, rank)), None
    if start == "orthogonal":
        if rank % 2:
            raise ValueError(f"init_lora_weights 'orthogonal' needs an even lora_rank, but got {rank}.")
        q, _ = np.linalg.qr(np.random.standard_normal((rank, rank)))
        a = (np.random.standard_normal((inner, rank // 2)) @ q[0::2]).T / 10
        return a, np.random.standard_normal((out, rank // 2)) @ q[1::2] / 10, None
    check_rank(start, weight.shape, rank)
    if loftq is not None:
        return loftq.decompose(weight, rank, scaling)
    weight = weight.astype(np.float64)
    if start == "olora":
        q, r = np.linalg.qr(weight)
        return r[:rank], q[:, :rank], None
    iterations = _FAST_PISSA.fullmatch(start)
    u, s, vt = fast_svd(weight, rank, int(iterations[1])) if iterations else np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank] / scaling)
    return root[:, None] * vt[:rank], u[:, :rank] * root, None


def fast_svd(matrix: np.ndarray, rank: int, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U, S and Vᵀ of the largest singular values of a matrix (m, n), approximately.

    Halko, Martinsson and Tropp, 2011, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1: the range of the matrix
    is looked for in random directions, `iterations` times through the matrix and its transpose; then the small matrix
    in that range is decomposed. The directions are those of one seed: the same matrix gives the same result in every
    process. PyTorch's svd_lowrank draws others, and looks in `rank` directions alone.

    Args:
        matrix: in float64.
        rank: how many singular values are wanted, at most min(m, n).
        iterations: subspace iterations; with more the result is nearer to the exact one.

    Returns:
        Arrays of the shapes (m, k), (k,) and (k, n), k at least `rank`.
    """
    width = min(rank + _MORE, *matrix.shape)
    directions = np.random.default_rng(0).standard_normal((matrix.shape[1], width))
    q, _ = np.linalg.qr(matrix @ directions)
    for _ in range(iterations):
        q, _ = np.linalg.qr(matrix.T @ q)
        q, _ = np.linalg.qr(matrix @ q)
    u, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, vt
