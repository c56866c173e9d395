"""Give what was put into a net the values of a file."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from mindspore import Tensor

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.graph.adapters import Adapter
from mindpet_lite.graph.modules_to_save import Found
from mindpet_lite.graph.saved_parameter import SavedParameter


def fill(delta: Delta, layer: LayerState, in_file: LayerState, saved: Mapping[int, SavedParameter]) -> None:
    """Give a delta the values and settings of a layer of a file, whose own types are those of `in_file`.

    Args:
        delta: to fill.
        layer: as the net takes it.
        in_file: as the file has it.
        saved: by their ids the base Parameters of the adapter, of which the delta may train some.
    """
    for name, parameter in delta.delta_parameters().items():
        value = Tensor(layer.tensors[name]).astype(parameter.dtype)
        if id(parameter) in saved:
            saved[id(parameter)].set_trained(value)
        else:
            put(parameter, value)
    delta.file_types = {name: value.dtype for name, value in in_file.tensors.items()}
    if layer.settings is not None:
        delta.adopt_settings(layer.settings)


def fill_saved(record: Adapter, values: AdapterState, in_file: AdapterState, found: Found,
                unchanged: Iterable[str]) -> None:
    """Give the base Parameters of an adapter the values of its file.

    Args:
        record: of the adapter.
        values: as the net takes them.
        in_file: as the file has them.
        found: where the net has each.
        unchanged: names of those that are the base's own.
    """
    known = {id(item.parameter): item for item in record.saved}
    for name, (path, parameter) in found.items():
        if id(parameter) not in known:
            known[id(parameter)] = SavedParameter(parameter, None)
            record.saved.append(known[id(parameter)])
        item = known[id(parameter)]
        item.path, item.file_type = path, in_file.trained[name].dtype
        item.set_trained(Tensor(values.trained[name]).astype(parameter.dtype))
