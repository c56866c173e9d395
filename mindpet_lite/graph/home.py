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
    """Return the adapter with paths for the layers that its file does not name (`PeftMethod.home`).

    They are those that have such deltas in the net already, else those that our own files name beside their hashes,
    else those that an injection without `target_modules` would adapt. The user's table comes first.
    """
    kind = METHODS.get(state.method)
    if kind is None or kind.peft is None:
        return state
    home = kind.peft.home
    names = [path for path in state.layers if home and f"{path}.".startswith(f"{home}.")]
    if not names or cells.keys() & names or renamed(names, name_map)[0]:
        return state
    there = [path for path, delta in deltas_in(cells).items() if delta.method == state.method]
    hashes = state.config.get(FIELD)
    saved = [path for path in (hashes if isinstance(hashes, Mapping) else ()) if path in cells]
    try:
        found = there or saved or ([] if kind.peft.needs else kind.default_paths(without_inner(cells)))
    except ValueError as error:
        problems.append(f"{error} Or say which with name_map={{{names[0]!r}: path}}, as the file names no layer.")
        return dataclasses.replace(state, layers={})
    if len(found) < len(names) or len(names) > 1 and len(found) > len(names):
        problems.append(f"the file holds {len(names)} layers without names, but the net has {len(found)} for them."
                        f"{kind.peft.needs and ' '}{kind.peft.needs}")
        return dataclasses.replace(state, layers={})
    return dataclasses.replace(state, layers=dict(zip(found, (state.layers[name] for name in names))))
