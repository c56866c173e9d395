"""What the layers of a file's adapter share, beside what the net's own layers share already."""
from __future__ import annotations

from collections.abc import Mapping

from mindspore import Parameter, nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.values import to_numpy
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.graph.adapters import shared_by
from mindpet_lite.graph.put_in import adapt
from mindpet_lite.graph.shapes import shape_problems


def with_shared(configs: Mapping[str, DeltaConfig], state: AdapterState, cells: Mapping[str, nn.Cell],
                present: Mapping[str, Delta], problems: list[str]
                ) -> tuple[dict[str, Delta], dict[str, Parameter], dict[str, Parameter]]:
    """Return the deltas of a file's layers, new where the net's are plain, and what they share.

    Args:
        configs: the settings that the file has for each layer, by path.
        state: the adapter of the file, under the net's paths.
        cells: of the net, by path.
        present: the deltas that the net has, by path.
        problems: a sentence each is added.

    Returns:
        The deltas by path; by name the Parameters that they share, and those that hold the values of the file: others
        only where the net's own layers share some already.
    """
    made: dict[str, Parameter] = {}
    shared: dict[str, Parameter] = {}
    adapted: dict[str, Delta] = {}
    for kind in {type(config) for config in configs.values()}:
        layers = {path: (cells[path], config) for path, config in configs.items() if type(config) is kind}
        own = shared_by(present.values(), kind.pet_type)
        # Before any memory is taken for what the settings say; those of new layers were looked at.
        misfits = [text for path, (cell, config) in layers.items() if own and path in present
                   for text in shape_problems(path, state.layers[path], config.shapes(cell))]
        if misfits:
            problems += misfits
            return {}, {}, {}
        shared.update(own)
        # A file that says no settings says nothing of what layers share either.
        silent = all(state.layers[path].settings is None for path in layers)
        given = {**({name: to_numpy(item) for name, item in own.items()} if silent else {}), **state.shared}
        try:
            made.update(kind.share(layers, given))
        except (TypeError, ValueError) as error:
            problems.append(str(error))
            return {}, {}, {}
    problems += [f"{name} is {shared[name].shape} in the net, {item.shape} in the file: load it into a net without "
                 f"this adapter." for name, item in made.items() if shared.get(name, item).shape != item.shape]
    shared = {name: shared.get(name, item) for name, item in made.items()}
    for path, config in configs.items():
        try:
            adapted[path] = present[path] if path in present else adapt(config.holding(shared), path, cells)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
    return adapted, shared, made
