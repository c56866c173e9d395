"""The hash of a layer of a net, as `formats.base_hash` has it; cheap for nets of any size."""
from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Parameter, nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.formats.base_hash import sample_places, weight_hash


def layer_hash(cell: nn.Cell, delta: Delta | None = None) -> str:
    """Return the hash of the layer's largest base Parameter that `delta` does not train; empty if it has none."""
    weight = base_weight(cell, delta)
    return "" if weight is None else parameter_hash(weight)


def parameter_hash(weight: Parameter) -> str:
    """Return the hash of a layer whose largest base Parameter this is."""
    sample = _values(weight).reshape(-1)[sample_places(weight.size)]
    # numpy knows MindSpore's bfloat16 by its bytes only.
    sample = sample.astype(np.float32) if weight.dtype == mindspore.bfloat16 else sample
    return weight_hash(tuple(weight.shape), sample)


def base_weight(cell: nn.Cell, delta: Delta | None) -> Parameter | None:
    """Return the largest base Parameter of a layer that `delta` does not train; None if it has none."""
    own = {} if delta is None else {**delta.delta_parameters(), **delta.setting_parameters()}
    trained = {id(item) for item in own.values()}
    base = [item for _, item in cell.parameters_and_names(expand=False) if id(item) not in trained]
    return max(base, key=lambda item: item.size) if base else None


def _values(weight: Parameter) -> np.ndarray:
    """Return the values as numpy, without a copy on the host."""
    try:
        return weight.asnumpy()
    except TypeError:
        # MindSpore's bfloat16 for numpy is made for some versions of numpy only.
        return weight.astype(mindspore.float32).asnumpy()
