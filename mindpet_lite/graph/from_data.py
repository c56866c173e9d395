"""Let the adapters of a net start from data: what their layers are given decides how they begin."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import nn
from mindspore.communication import get_group_size

from mindpet_lite.arguments import some_of
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.data_start import Begin, DataStart, Gathered
from mindpet_lite.graph.adapters import Adapter, deltas
from mindpet_lite.graph.inputs import call, check_given, heard, rows_of, running
from mindpet_lite.graph.tree import replace

# By path the layer that waits, and what is gathered for it.
_Found = dict[str, tuple[Delta, Gathered]]


def initialize_from_data(net: nn.Cell, batches: Iterable[Any], forward: Callable[[nn.Cell, Any], Any] | None = None
                         ) -> nn.Cell:
    """Start the adapters of `net` from data, in place: those that were injected with a start such as EVA or CorDA.

    Runs the net on the batches, in evaluation and PyNative mode, and gathers what each adapted layer is given. Nothing
    trains. Call it after `mindpet_lite.get_pet_model` and before the optimizer is made: EVA may give layers
    another rank, and those that it gives none are plain again.

    Where every layer has settled before the batches end (EVA's tau), the others are not read. A mapping may hold
    "attention_mask" and "labels", by which EVA leaves places out.

    Args:
        net: with adapters of `init_lora_weights` "eva" or "corda", see `mindpet_lite.LoraConfig`.
        batches: each a tuple or list of the net's arguments, a mapping of them by name, or one argument.
        forward: what runs the net on a batch, `forward(net, batch)`, for batches of another form. Default: None.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: no adapter waits for data, or one has trained; there is no batch; a layer was given nothing, or NaN
            or infinite values; a mask does not fit; the data are too few. Or this is a distributed job, where each
            process would see other data. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> config = mp.LoraConfig(2, 4, target_modules=["0"], init_lora_weights="eva")
        >>> net = mp.get_pet_model(net, config)
        >>> batches = [Tensor(np.random.standard_normal((8, 4)).astype(np.float32)) for _ in range(4)]
        >>> net = mp.initialize_from_data(net, batches)
        >>> net[0].lora_rank
        2
    """
    waiting = {path: delta for path, delta in deltas(net).items() if delta.data_start is not None}
    if not waiting:
        raise ValueError("No adapter of the net waits for data: they start so with init_lora_weights='eva' or 'corda' "
                         "in LoraConfig, and begin once.")
    trained = [path for path, delta in waiting.items() if delta.delta_norm() != 0]
    if trained:
        raise ValueError(f"{some_of(trained)}: trained already, which a start would overwrite. Adapt the net anew.")
    if get_group_size() > 1:
        raise ValueError("Each process of a distributed job would start from its own data: start the net in one "
                         "process, save it with mindspore.save_checkpoint(), and load that in all.")
    groups: dict[DataStart, _Found] = {}
    for path, delta in waiting.items():
        groups.setdefault(delta.data_start, {})[path] = (delta, delta.data_start.gathered(delta))
    _gather(net, groups, batches, forward or call)
    begins: dict[str, Begin] = {}
    for start, found in groups.items():
        begins.update(start.begin(found))
    _begin(net, waiting, begins)
    return net


def _gather(net: nn.Cell, groups: Mapping[DataStart, _Found], batches: Iterable[Any],
            forward: Callable[[nn.Cell, Any], Any]) -> None:
    """Run the net on the batches, and let each layer's share take in what it is given."""
    count = 0
    given = {path: 0 for found in groups.values() for path in found}
    places: dict[str, np.ndarray | None] = {}

    gathered = {path: share for found in groups.values() for path, (_, share) in found.items()}
    layers = {path: delta for found in groups.values() for path, (delta, _) in found.items()}

    def take(path: str, value: Any) -> None:
        rows = rows_of(path, value, places[path])
        given[path] += len(rows)
        if len(rows):
            gathered[path].add(rows)

    with running(net), heard(layers, take):
        for batch in batches:
            for start, found in groups.items():
                places.update(dict.fromkeys(found, start.places(batch)))
            forward(net, batch)
            count += 1
            if all(given.values()) and all(start.is_settled(found) for start, found in groups.items()):
                break
    check_given(count, given)


def _begin(net: nn.Cell, waiting: Mapping[str, Delta], begins: Mapping[str, Begin]) -> None:
    """Put the starts into effect."""
    records: Sequence[Adapter] = list({id(item.adapter): item.adapter for item in waiting.values()
                                       if item.adapter is not None}.values())
    for record in records:
        record.unwatch(delta for delta in waiting.values() if delta.adapter is record)
    swaps: dict[nn.Cell, nn.Cell] = {}
    for path, old in waiting.items():
        layer = begins[path]()
        if layer is not old:
            swaps[old] = old.plain_cell() if layer is None else layer
    if swaps:
        replace(net, swaps)
    for delta in deltas(net).values():
        delta.watch_start()
