"""Embeddings and output layers that PEFT saved along when a vocabulary grew, under the base's names."""
from __future__ import annotations

import dataclasses

import numpy as np

from mindpet_lite.formats.state import AdapterState
from mindpet_lite.names.parameter_names import is_head
from mindpet_lite.offline.base import Base


def placed_heads(state: AdapterState, base: Base) -> AdapterState:
    """Return the adapter with its output layer as the base has it.

    transformers writes some output layers under another name than the net has (``embed_out`` of GPT-NeoX), and the bias
    of BERT's is that of the cell around it. What is of an output layer that the base lacks stays as it is.
    """
    trained = dict(state.trained)
    for name in state.trained:
        head, _, last = name.rpartition(".")
        if not is_head(head) or head in state.layers or _is_there(head, base):
            continue
        if last == "bias":
            _move(trained, name, f"{head.rpartition('.')[0]}.bias", base)
            continue
        others = [path for path in base.owners if is_head(path)]
        if len(others) == 1:
            _move(trained, name, f"{others[0]}.{last}", base)
    return dataclasses.replace(state, trained=trained)


def _is_there(path: str, base: Base) -> bool:
    """Tell whether the base has a layer at the path, or one that ends as it does."""
    return any(f".{owner}".endswith(f".{path}") or f".{path}".endswith(f".{owner}") for owner in base.owners if owner)


def _move(trained: dict[str, np.ndarray], name: str, place: str, base: Base) -> None:
    own = base.parameter(place)
    if own is not None and base.shape(own) == trained[name].shape:
        trained[own] = trained.pop(name)
