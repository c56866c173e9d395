"""How LoHa and LoKr cut a weight, as LyCORIS and PEFT do: which tensors a layer has follows from its sizes."""
from __future__ import annotations

import functools
import math


@functools.cache
def factors_of(dimension: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is the dimension.

    `factor` and the rest where `factor` divides it; else the largest divisor up to `factor` and to the dimension's
    root (-1: to the root alone), and the rest.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = next((number for number in range(most, 1, -1) if dimension % number == 0), 1)
    return first, dimension // first


def core_of(kernel: tuple[int, ...], is_effective: bool) -> tuple[int, ...]:
    """Return the last axes of the tensor that sees the kernel alone; nothing for a kernel of one place.

    PEFT gives that of a kernel with one axis a second one.
    """
    if not is_effective or all(size == 1 for size in kernel):
        return ()
    return (*kernel, 1) if len(kernel) == 1 else kernel


def first_shapes(rows: int, columns: int, rank: int, is_split: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of LoKr's first factor (rows, columns), whole or, where that is less, as a product.

    Args:
        rows: of the factor.
        columns: of the factor.
        rank: of a product.
        is_split: it may be a product (`decompose_both`).
    """
    if is_split and rank < max(rows, columns) / 2:
        return {"w1_a": (rows, rank), "w1_b": (rank, columns)}
    return {"w1": (rows, columns)}


def second_shapes(rows: int, columns: int, rank: int, kernel: tuple[int, ...],
                  core: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of LoKr's second factor (rows, columns, *kernel), whole or, where that is less, as a product.

    Args:
        rows: of the factor.
        columns: of the factor.
        rank: of a product.
        kernel: of the layer; nothing for a dense one.
        core: as `core_of` gives it.
    """
    if rank >= max(rows, columns) / 2:
        return {"w2": (rows, columns, *kernel)}
    if core:
        return {"w2_a": (rank, rows), "w2_b": (rank, columns), "t2": (rank, rank, *core)}
    return {"w2_a": (rows, rank), "w2_b": (rank, columns * math.prod(kernel))}
