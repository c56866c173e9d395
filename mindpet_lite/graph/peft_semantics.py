"""What an adapter of PEFT means in a net whose layers are shared or tied."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mindspore import nn

from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.peft_config import unhit_patterns, unknown_fields
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.graph.tree import cells_by_path, owners_of_parameters


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
    found += [f"its {field} {pattern!r} fits none of its layers." for field, pattern in unhit_patterns(config, in_file)]
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


def tied_tokens(net: nn.Cell, state: AdapterState) -> list[str]:
    """Return why tokens cannot train, where the table is tied: PEFT then changes Hugging Face's output layers too."""
    mapping = state.config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else "transformers"
    if FIELD in state.config or not str(library).startswith("transformers"):
        return []
    cells = cells_by_path(net)
    trained = {id(cells[path]): path for path, layer in state.layers.items()
               if "token_indices" in (layer.settings or {}) and path in cells}
    return [f"trainable_token_indices: the table of {trained[id(cell)]} is the weight of {other} too (tied weights), "
            f"whose rows PEFT changes with it; this is not supported. Use a net whose {other} has a weight of its own."
            for _, owners in owners_of_parameters(net) for _, cell in owners if id(cell) in trained
            for other in [next((path for path, one in owners if one is not cell), "")] if other]
