"""Reading a model's sizes from a config."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the plan walks through one by one, and more than any model has.
_COUNTS, _MOST = ("num_hidden_layers", "num_layers", "num_res_blocks", "transformer_depth"), 10_000


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return the positive int at `key`.

    Raises:
        ValueError: it is missing without a default, or something else.
    """
    value = config.get(key, default)
    if value is None:
        raise ValueError(f"the key {key} is missing, which the plan needs.")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} must be a positive int, but is {value!r:.100}.")
    if key in _COUNTS and value > _MOST:
        raise ValueError(f"{key} must be at most {_MOST}, but is {value!r:.100}.")
    return value


def numbers(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return the list of positive ints at `key`.

    Raises:
        ValueError: it is missing, or something else.
    """
    values = config.get(key)
    if values is None:
        raise ValueError(f"the key {key} is missing, which the plan needs.")
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} must be a list of positive ints, but is {values!r:.100}.")
    return tuple(number({key: value}, key) for value in values)


def switch(config: Mapping[str, Any], key: str) -> bool:
    """Return what `key` says, False without it.

    Raises:
        ValueError: it is neither true nor false.
    """
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, but is {value!r:.100}.")
    return value
