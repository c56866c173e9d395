"""Which base an adapter was trained on, by the hashes in its config."""
from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping

import numpy as np

from mindpet_lite.formats.names import Table, map_names, renamed
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.offline.base import Base
from mindpet_lite.offline.numbers import widened

# The field of an adapter's config that holds the hashes by layer path, as `save_adapter` writes it.
FIELD = "mindpet_lite_base"
_SAMPLE = 64


def under_names(state: AdapterState, names: Iterable[str], table: Table | None) -> AdapterState:
    """Return the adapter with the names of a base, for its layers, its trained parameters and its hashes.

    Raises:
        ValueError: as `formats.names.map_names`.
    """
    names = list(names)
    found, paths = renamed(state, names, table), map_names(state.layers, names, table)
    expected = state.config.get(FIELD)
    if not isinstance(expected, Mapping):
        return found
    hashes = {paths.get(path, path): value for path, value in expected.items()}
    return dataclasses.replace(found, config={**state.config, FIELD: hashes})


def fingerprint(base: Base, layer: str) -> str:
    """Return the hash of a layer of the base: over the shape and some values of its largest tensor, in float16."""
    name = max(base.owners[layer].values(), key=lambda name: math.prod(base.shape(name)))
    shape = base.shape(name)
    size = math.prod(shape)
    places = np.linspace(0, size - 1, min(_SAMPLE, size)).astype(np.int64)
    with np.errstate(over="ignore"):
        sample = widened(base.sample(name, places)).astype("<f2")
    return hashlib.sha256(repr(tuple(shape)).encode() + sample.tobytes()).hexdigest()[:16]


def differing(state: AdapterState, base: Base) -> list[str]:
    """Return the layers of an adapter, under the base's names, that were trained on other weights than the base's."""
    expected = state.config.get(FIELD)
    return [path for path, value in expected.items() if path in state.layers and value != fingerprint(base, path)] \
        if isinstance(expected, Mapping) else []
