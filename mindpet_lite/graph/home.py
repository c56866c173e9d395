"""Which layer of a net an adapter is on whose file names none."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mindspore import nn

from mindpet_lite.delta import METHODS
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.graph.adapters import deltas_in
from mindpet_lite.graph.tree import without_inner
from mindpet_lite.names.table import Table, renamed


def with_path(state: AdapterState, cells: Mapping[str, nn.Cell], name_map: Table | None, problems: list[str]
              ) -> AdapterState:
    """Return the adapter with a path for a layer that its file does not name (`PeftMethod.home`).

    It is the one that has such a delta in the net already, else the one that our own files name beside their hashes,
    else the one that an injection without `target_modules` would adapt. The user's table comes first.
    """
    kind = METHODS.get(state.method)
    home = kind.peft.home if kind is not None and kind.peft is not None else ""
    if kind is None or home not in state.layers or home in cells or home in renamed([home], name_map)[0]:
        return state
    there = [path for path, delta in deltas_in(cells).items() if delta.method == state.method]
    hashes = state.config.get(FIELD)
    saved = [path for path in (hashes if isinstance(hashes, Mapping) else ()) if path in cells]
    try:
        found = there or saved or kind.default_paths(without_inner(cells))
    except ValueError as error:
        problems.append(f"{error} Or say which with name_map={{{home!r}: path}}, as the file names no layer.")
        return dataclasses.replace(state, layers={})
    return dataclasses.replace(state, layers={found[0]: state.layers[home]})
