"""PEFT's `layer_replication`: what it may be."""
from __future__ import annotations

from typing import Any


def range_problem(value: Any) -> str:
    """Return why a value is no list of ranges of layers, or nothing. None and an empty list are: of no layer."""
    good = value is None or isinstance(value, (list, tuple)) and all(
        isinstance(part, (list, tuple)) and len(part) == 2 and all(type(number) is int for number in part)
        and 0 <= part[0] < part[1] for part in value)
    return "" if good else (f"layer_replication must be a list of ranges of layers, each [first, one after the last], "
                            f"but is {value!r:.100}.")
