"""What an adapter of PEFT means in a net whose layers are shared or tied."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mindspore import nn

from mindpet_lite.formats.base_hash import FIELD


def shared_layers(config: Mapping[str, Any], cells: Mapping[str, nn.Cell], adapted: Collection[str]) -> list[str]:
    """Return, a sentence each, which layers of an adapter that loads stand under other paths of the net too.

    Args:
        config: the file's.
        cells: of the net, by path.
        adapted: the paths of the layers that it adapts.
    """
    if FIELD in config:
        return []
    found = []
    paths: dict[int, list[str]] = {}
    for path, cell in cells.items():
        paths.setdefault(id(cell), []).append(path)
    for one in adapted:
        others = [path for path in paths.get(id(cells[one]), []) if path != one]
        if others:
            found.append(f"{one} is one layer with {', '.join(others)} in this net, so that both are adapted; PEFT "
                         f"adapts a shared module under the name in the file only.")
    return found
