"""Sums over what layers are given, by which a quantised base chooses its codes."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from mindspore import nn
from mindspore.communication import get_group_size

from mindpet_lite.delta.data_start import seen_places
from mindpet_lite.graph.inputs import check_given, heard, rows_of, running


def batch_problems(chosen: Mapping[str, Any], batches: Iterable[Any] | None, forward: Any) -> Iterable[str]:
    """Yield why codes cannot be chosen by batches."""
    if batches is None:
        if forward is not None:
            yield "forward runs the net on batches: give them too."
        return
    if get_group_size() > 1:
        yield ("each process of a distributed job would round by its own batches: quantise the net in one process, "
               "save it with mindspore.save_checkpoint(), and load that in all.")
    for path, cell in chosen.items():
        if cell.weight.has_init:
            yield f"{path}: {cell.weight.name} has no numbers yet, with which the net could run on batches."


def grams_of(net: nn.Cell, layers: Mapping[str, nn.Cell], batches: Iterable[Any],
             forward: Callable[[nn.Cell, Any], Any]) -> dict[str, np.ndarray]:
    """Run the net on the batches, and return Xᵀ X of all the rows X that each layer is given, by path.

    Raises:
        ValueError: there is no batch; or a layer is given nothing, or what has no sum.
    """
    sums: dict[str, np.ndarray] = {}
    rows = dict.fromkeys(layers, 0)
    count = 0
    places: np.ndarray | None = None
    # Layers that are given one tensor after each other, as q, k and v are, share its product; batches do not: their
    # masks may differ.
    none: tuple[Any, int, np.ndarray] = (None, 0, np.empty(0))
    last = none

    def take(path: str, value: Any) -> None:
        nonlocal last
        if value is not last[0]:
            found = rows_of(path, value, places).astype(np.float32)
            last = value, len(found), found.T @ found
        sums[path] = sums[path] + last[2] if path in sums else last[2]
        rows[path] += last[1]

    with running(net), heard(layers, take):
        for batch in batches:
            places, last = seen_places(batch), none
            forward(net, batch)
            count += 1
    check_given(count, rows)
    return sums
