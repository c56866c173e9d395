"""The `pet_config` block of a document, at its top or where MindFormers puts it."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "pet_config"
# MindFormers' whole configuration, its `model` block, or one of the two without what stands around.
PLACES = (KEY, f"model.{KEY}", f"model.model_config.{KEY}", f"model_config.{KEY}")


def pet_block(document: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """Return the one `pet_config` block of a document; None if it has none.

    Raises:
        TypeError: the block is no mapping.
        ValueError: there are several, or it stands elsewhere than in `PLACES`.
    """
    found = _blocks(document)
    if not found:
        return None
    if len(found) > 1:
        places = " and at ".join(list(found)[:10])
        raise ValueError(f"{KEY} stands at {places}, but one net takes one: keep one of them, or pass each block as a "
                         f"mapping to get_pet_model with the net it is meant for.")
    place, block = next(iter(found.items()))
    if place not in PLACES:
        raise ValueError(f"{KEY} stands at {place}, but is read at {', '.join(PLACES)}: a block elsewhere is meant for "
                         f"a part of the net. Pass the block as a mapping to get_pet_model with that part.")
    if not isinstance(block, Mapping):
        raise TypeError(f"{KEY} must be a mapping with 'pet_type', but got {block!r:.100}.")
    return block


def _blocks(document: Mapping[Any, Any]) -> dict[str, object]:
    """Return every value under the key `pet_config` by its place, without looking into it."""
    found: dict[str, object] = {}
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        place, value = pending.pop()
        # A YAML document may hold itself by an alias.
        if id(value) in seen or not isinstance(value, (Mapping, list)):
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in reversed(list(items)):
            path = f"{place}.{key}" if place else str(key)
            if key == KEY:
                found[path] = item
            else:
                pending.append((path, item))
    return dict(sorted(found.items()))
