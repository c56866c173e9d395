"""Starts that are made from what layers are given: what a method tells whoever runs the net on some data."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from mindspore import Tensor

from mindpet_lite.delta.base import Delta

# Puts a start into effect, and returns what stands in the layer's place then: a delta, or None for the plain layer.
Begin = Callable[[], Delta | None]


class Gathered(Protocol):
    """What a start keeps of all that one layer was given."""

    def add(self, rows: np.ndarray) -> None:
        """Take in what one call of the layer was given: finite numbers of the shape (rows, inputs), one row or more."""


class DataStart(Protocol):
    """A start of an adapter's layers; those with an equal one start together."""

    def places(self, batch: Any) -> np.ndarray | None:
        """Return which places of a batch count, as booleans in the shape that inputs have before their last axis.

        None where all do.
        """

    def gathered(self, delta: Any) -> Gathered:
        """Return what takes in the inputs of a layer."""

    def is_settled(self, found: Mapping[str, tuple[Any, Any]]) -> bool:
        """Tell whether more data would change nothing."""

    def begin(self, found: Mapping[str, tuple[Any, Any]]) -> dict[str, Begin]:
        """Return for each layer what puts its start into effect; change nothing yet.

        Args:
            found: by path the delta and what was gathered for it, something at least.

        Raises:
            ValueError: the data are too few, or of no use. All problems stand in one message.
        """


def values_in(batch: Any, name: str) -> np.ndarray | None:
    """Return what a batch that is a mapping has by this name, in numpy; None without it."""
    value = batch.get(name) if isinstance(batch, Mapping) else None
    if value is None:
        return None
    return value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)


def seen_places(batch: Any) -> np.ndarray | None:
    """Return where the "attention_mask" of a batch is not 0; None for a batch without one."""
    mask = values_in(batch, "attention_mask")
    return None if mask is None else mask != 0


def fields_of(kind: type, name: str, value: Any) -> Any:
    """Return the settings of a start, given as themselves or as a mapping of their fields.

    Args:
        kind: their class, a dataclass.
        name: of the setting that holds them.
        value: what was given; None for the defaults.

    Raises:
        TypeError, ValueError: it is neither, or has a field that the class does not.
    """
    if value is None or isinstance(value, kind):
        return value or kind()
    known = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping with some of {', '.join(known)}, but got {value!r:.100}.")
    unknown = [field for field in value if field not in known]
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r:.100} here; it has {', '.join(known)}.")
    return kind(**value)
