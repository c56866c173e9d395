"""How LoRA's factors start, besides by MindSpore's initialisers: by PEFT's names of `init_lora_weights`."""
from __future__ import annotations

import numpy as np

# Those that move the base: what the factors start with is taken out of the weight, so that the sum is the weight.
RESIDUAL = ("pissa", "olora")
STARTS = (True, False, "gaussian", "orthogonal", *RESIDUAL)


def check_start(value: object) -> None:
    """Raise ValueError unless `value` is a start that we have."""
    if not any(value is item or isinstance(item, str) and value == item for item in STARTS):
        raise ValueError(f"init_lora_weights must be one of {', '.join(map(str, STARTS))}, but got {value!r:.100}. "
                         f"(Starts that need data, such as EVA, CorDA and LoRA-GA, are not made here.)")


def factors(start: str, weight: np.ndarray, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors A (rank, in) and B (out, rank) with which LoRA on `weight` (out, in) starts.

    - gaussian: A normal with deviation 1 / rank, B zero (Hu et al., 2021).
    - orthogonal: A and B random, their rows and columns from the odd and even rows of one orthogonal matrix, so that
      B A is zero and neither is (PEFT's "orthogonal"). The rank must be even.
    - pissa: the `rank` largest singular values and vectors of the weight, shared between A and B (PiSSA, Meng et al.,
      2024, https://arxiv.org/abs/2404.02948, eq. 2 to 4).
    - olora: the first `rank` columns of Q and rows of R of the weight's QR decomposition (OLoRA, Büyükakyüz, 2024,
      https://arxiv.org/abs/2406.01775, section 3).

    Args:
        start: its name.
        weight: of the base, in float32.
        rank: of the update.
        scaling: what B A is multiplied with.

    Raises:
        ValueError: the rank does not go with the start.
    """
    out, inner = weight.shape
    if start == "gaussian":
        return np.random.standard_normal((rank, inner)) / rank, np.zeros((out, rank))
    if start == "orthogonal":
        if rank % 2:
            raise ValueError(f"init_lora_weights 'orthogonal' needs an even lora_rank, but got {rank}.")
        q, _ = np.linalg.qr(np.random.standard_normal((rank, rank)))
        a = (np.random.standard_normal((inner, rank // 2)) @ q[0::2]).T / 10
        return a, np.random.standard_normal((out, rank // 2)) @ q[1::2] / 10
    if rank > min(out, inner):
        raise ValueError(f"init_lora_weights {start!r} takes lora_rank {rank} of a weight of rank {min(out, inner)} "
                         f"at most: take a lower rank.")
    if start == "pissa":
        u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        root = np.sqrt(s[:rank] / scaling)
        return root[:, None] * vt[:rank], u[:, :rank] * root
    q, r = np.linalg.qr(weight.astype(np.float64))
    return r[:rank], q[:, :rank]
