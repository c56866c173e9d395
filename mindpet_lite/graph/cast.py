"""Cells that compute in float32 in a net of half precision."""
from __future__ import annotations

from collections.abc import Sequence

from mindspore import dtype as mstype
from mindspore import nn

from mindpet_lite.delta.base import FLOAT_TYPES
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.match import named_by
from mindpet_lite.graph.tree import cells_by_path, drop_compiled_graphs, require_cell, without_inner


def cast_to_float32(net: nn.Cell, patterns: str | Sequence[str]) -> list[str]:
    r"""Let cells of a net in half precision, such as norms and heads, have float32 Parameters and compute in float32.

    Each cell takes its input as float32 and gives float32; what comes after it must take that, as layers with
    `to_float(float16)` do. Cells below a named one are cast with it. It is what recipes for int8 bases do to norms and
    to `lm_head` by hand.

    Args:
        net: any Cell.
        patterns: a regular expression that must match a cell's whole path, or a list of names (each equal to a path or
            to its last parts).

    Returns:
        The paths of the cells, in the order of the net.

    Raises:
        TypeError: `net` is no Cell, or `patterns` neither text nor a list of texts.
        ValueError: `patterns` is empty or hits nothing, or a cell has no Parameter of a float type. The net is
            unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> import mindspore as ms
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.LayerNorm((8,)), nn.Dense(8, 2)).to_float(ms.float16)
        >>> for item in net.get_parameters():
        ...     _ = item.set_dtype(ms.float16)
        >>> mp.cast_to_float32(net, ["1"])
        ['1']
        >>> net[1].gamma.dtype, net[0].weight.dtype
        (mindspore.float32, mindspore.float16)
    """
    cells = without_inner(cells_by_path(require_cell(net)))
    owners = {path: cell for path, cell in cells.items() if path and any(True for _ in cell.get_parameters())}
    problems: list[str] = []
    found = named_by("patterns", patterns, owners, next(iter(owners), "norm"), problems)
    problems += [f"{path}: none of its Parameters is of a float type." for path in found
                 if not any(item.dtype in FLOAT_TYPES for item in owners[path].get_parameters())]
    if problems:
        raise ValueError("The net cannot be cast so, and is unchanged:\n  " + listed(problems))
    for path in found:
        for item in owners[path].get_parameters():
            if item.dtype in FLOAT_TYPES:
                item.set_dtype(mstype.float32)
        owners[path].to_float(mstype.float32)
    drop_compiled_graphs(net)
    return found
