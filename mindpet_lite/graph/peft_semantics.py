"""What an adapter of PEFT means in a net whose layers are shared or tied."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mindspore import nn

from mindpet_lite.arguments import some_of
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.peft_config import unhit_patterns, unknown_fields


def remarks(config: Mapping[str, Any], in_file: Collection[str], cells: Mapping[str, nn.Cell],
            adapted: Collection[str]) -> list[str]:
    """Return, a sentence each, what a user must know of an adapter that loads.

    Args:
        config: the file's.
        in_file: the paths of its layers.
        cells: of the net, by path.
        adapted: the paths of the layers that it adapts.
    """
    unknown = unknown_fields({name: value for name, value in config.items() if name != FIELD})
    found = [f"its config has {', '.join(unknown)}, which no version of PEFT known here has: nothing is done with it, "
             f"and it is written again when the adapter is saved."] if unknown else []
    unhit = [f"{field} {pattern!r:.100}" for field, pattern in unhit_patterns(config, in_file)]
    found += [f"its {some_of(unhit)} fits none of its layers."] if unhit else []
    if FIELD in config:
        return found
    paths: dict[int, list[str]] = {}
    for path, cell in cells.items():
        paths.setdefault(id(cell), []).append(path)
    for one in adapted:
        others = [path for path in paths.get(id(cells[one]), []) if path != one]
        if others:
            found.append(f"{one} is one layer with {', '.join(others)} in this net, so that both are adapted; PEFT "
                         f"adapts a shared module under the name in the file only.")
    return found
