"""Embeddings and output layers that PEFT saved along when a vocabulary grew, under the base's names."""
from __future__ import annotations

import dataclasses

import numpy as np

from mindpet_lite.formats.state import AdapterState
from mindpet_lite.names.parameter_names import is_embedding, is_head
from mindpet_lite.offline.base import Base


def placed_heads(state: AdapterState, base: Base) -> tuple[AdapterState, set[str]]:
    """Return the adapter with its output layer as the base has it, and the tables that are the output layer too.

    A base whose output layer has the weight of its embedding (tied weights) holds one of both; PEFT's file holds both,
    with the same values. transformers writes some output layers under another name than the net has (``embed_out`` of
    GPT-NeoX), and the bias of BERT's is that of the cell around it.

    Raises:
        ValueError: the base has no output layer of its own, and that of the file is not its embedding.
    """
    trained, tied = dict(state.trained), set()
    for name, value in state.trained.items():
        head, _, last = name.rpartition(".")
        if not is_head(head) or head in state.layers or _is_there(head, base):
            continue
        if last == "bias":
            _move(trained, name, f"{head.rpartition('.')[0]}.bias", base)
            continue
        others = [path for path in base.owners if is_head(path)]
        if len(others) == 1:
            _move(trained, name, f"{others[0]}.{last}", base)
            continue
        same = [other for other, table in state.trained.items()
                if is_embedding(other.rpartition(".")[0]) and _equal(value, table)]
        if not same:
            raise ValueError(f"{name}: the base has no output layer of its own, for its weight is that of the "
                             f"embedding, but the file's is not that of its embedding: untie the base first.")
        del trained[name]
        tied.update(same)
    return dataclasses.replace(state, trained=trained), tied


def _is_there(path: str, base: Base) -> bool:
    """Tell whether the base has a layer at the path, or one that ends as it does."""
    return any(f".{owner}".endswith(f".{path}") or f".{path}".endswith(f".{owner}") for owner in base.owners if owner)


def _move(trained: dict[str, np.ndarray], name: str, place: str, base: Base) -> None:
    own = base.parameter(place)
    if own is not None and base.shape(own) == trained[name].shape:
        trained[own] = trained.pop(name)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
