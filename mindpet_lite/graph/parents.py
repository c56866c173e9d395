"""Why a layer cannot be adapted where it stands: the cell around it may never call it, but read its weight."""
from __future__ import annotations

from collections.abc import Mapping

from mindspore import nn

from mindpet_lite.delta.delta_config import DeltaConfig

# By the class of the cell around them, the names of such layers. nn.TransformerEncoderLayer and its kin hold one.
_READ_BY_PARENT: dict[type[nn.Cell], tuple[str, ...]] = {nn.MultiheadAttention: ("out_proj",)}


def refusal_at(config: DeltaConfig, path: str, cells: Mapping[str, nn.Cell]) -> str | None:
    """Return why a method cannot adapt the layer at `path`, for what the layer is or what stands around it, or None."""
    reason = config.refuses(cells[path])
    if reason is None and not config.adds_nothing:
        reason = _never_called(path, cells)
    return reason or config.refusal_in(path, cells)


def _never_called(path: str, cells: Mapping[str, nn.Cell]) -> str | None:
    around, _, name = path.rpartition(".")
    parent = cells.get(around)
    for kind, names in _READ_BY_PARENT.items():
        if isinstance(parent, kind) and name in names:
            return (f"nn.{kind.__name__} does not call {name}, it reads its weight: a delta there would never run. "
                    f"Leave it out with exclude_modules, or use an attention that calls its layers.")
    return None
