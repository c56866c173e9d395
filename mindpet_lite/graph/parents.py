"""Layers that are never called, because the cell around them reads their weight itself."""
from __future__ import annotations

from collections.abc import Mapping

from mindspore import nn

# By the class of the cell around them, the names of such layers. nn.TransformerEncoderLayer and its kin hold one.
_READ_BY_PARENT: dict[type[nn.Cell], tuple[str, ...]] = {nn.MultiheadAttention: ("out_proj",)}


def never_called(path: str, cells: Mapping[str, nn.Cell]) -> str | None:
    """Return why the layer at `path` cannot be adapted, where the cell around it is known not to call it."""
    around, _, name = path.rpartition(".")
    parent = cells.get(around)
    for kind, names in _READ_BY_PARENT.items():
        if isinstance(parent, kind) and name in names:
            return (f"nn.{kind.__name__} does not call {name}, it reads its weight: a delta there would never run. "
                    f"Leave it out with exclude_modules, or use an attention that calls its layers.")
    return None
