"""An adapter under the names of a net or a base."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.names.components import in_paths
from mindpet_lite.names.placing import map_names
from mindpet_lite.names.table import Table


def placed(state: AdapterState, paths_in_net: Iterable[str], table: Table | None = None,
           component: str | None = None) -> AdapterState:
    """Return the adapter with the net's paths: of its layers, its base parameters and its hashes.

    Args:
        state: as it was read.
        paths_in_net: of all layers of the net or the base.
        table: the user's own names, see `names.placing.map_names`.
        component: that the net is, where the user says so; the adapter is of the same one.

    Raises:
        ValueError: as `map_names`.
    """
    owners = {name: name.rpartition(".")[::2] for name in state.trained}
    paths = map_names([*state.layers, *(owner for owner, _ in owners.values() if owner)], paths_in_net, table,
                      state.component, component or "")
    trained = {f"{paths[owner]}.{last}" if owner else last: state.trained[name]
               for name, (owner, last) in owners.items()}
    config, hashes = state.config, state.config.get(FIELD)
    if isinstance(hashes, Mapping):
        config = {**config, FIELD: {paths.get(path, path): value for path, value in hashes.items()}}
    layers = {paths[path]: layer for path, layer in state.layers.items()}
    return dataclasses.replace(state, layers=layers, trained=trained, config=config,
                               component="" if in_paths(layers) else state.component)
