"""Which base an adapter was trained on: a short hash of each adapted layer's weight, cheap for nets of any size."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping

import mindspore
import numpy as np
from mindspore import Parameter, nn

from mindpet_lite.delta.base import Delta

# The field of an adapter's config that holds the hashes by layer path.
FIELD = "mindpet_lite_base"
_SAMPLE = 64


def fingerprint(cell: nn.Cell) -> str:
    """Return a hash over the shape and some values of the layer's largest base Parameter; empty if it has none.

    The values are taken in float16, so that a base stored in another precision is the same base.
    """
    base = _base_parameters(cell)
    if not base:
        return ""
    weight = max(base, key=lambda item: item.size)
    places = np.linspace(0, weight.size - 1, min(_SAMPLE, weight.size)).astype(np.int64)
    with np.errstate(over="ignore"):
        sample = _values(weight).reshape(-1)[places]
        sample = (sample.astype(np.float32) if weight.dtype == mindspore.bfloat16 else sample).astype("<f2")
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + sample.tobytes()).hexdigest()[:16]


def differing(expected: Mapping[str, str], cells: Mapping[str, nn.Cell]) -> list[str]:
    """Return the paths of the layers whose hash is not the expected one."""
    return [path for path, found in expected.items() if path in cells and fingerprint(cells[path]) != found]


def _values(weight: Parameter) -> np.ndarray:
    """Return the values as numpy, without a copy on the host."""
    try:
        return weight.asnumpy()
    except TypeError:
        # MindSpore's bfloat16 for numpy is made for some versions of numpy only.
        return weight.astype(mindspore.float32).asnumpy()


def _base_parameters(cell: nn.Cell) -> list[Parameter]:
    own: set[int] = set()
    if isinstance(cell, Delta):
        own = {id(item) for item in [*cell.delta_parameters().values(), *cell.live_parameters().values()]}
    return [item for _, item in cell.parameters_and_names(expand=False) if id(item) not in own]
