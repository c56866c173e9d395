"""Which base an adapter was trained on: a short hash for each adapted layer, in the adapter's config."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# The field of an adapter's config that holds the hashes by layer path, as `save_adapter` writes it.
FIELD = "mindpet_lite_base"
_SAMPLE = 64


def sample_places(size: int) -> np.ndarray:
    """Return which values of a flat weight of this size the hash is made of."""
    return np.linspace(0, size - 1, min(_SAMPLE, size)).astype(np.int64)


def weight_hash(shape: tuple[int, ...], sample: np.ndarray) -> str:
    """Return the hash of a weight from its shape and the values at `sample_places`.

    The values are taken in float16, so that a base stored in another precision is the same base.
    """
    with np.errstate(over="ignore"):
        values = sample.astype("<f2")
    return hashlib.sha256(repr(tuple(shape)).encode() + values.tobytes()).hexdigest()[:16]


def differing(config: Mapping[str, Any], hash_of: Mapping[str, Callable[[], str]]) -> list[str]:
    """Return the layers of an adapter that were trained on other weights than those at hand.

    Args:
        config: of the adapter, with the hashes under `FIELD` or without.
        hash_of: what gives the hash of each layer at hand, by path.
    """
    expected = config.get(FIELD)
    return [path for path, value in expected.items() if path in hash_of and value != hash_of[path]()] \
        if isinstance(expected, Mapping) else []
