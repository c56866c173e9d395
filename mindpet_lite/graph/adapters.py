"""What an adapter is on a net: a record that its layers share."""
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite.arguments import some_of, warn_user
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.values import Around, Load, unwatch, watch
from mindpet_lite.graph.base_hash import base_weight, parameter_hash
from mindpet_lite.graph.saved_parameter import SavedParameter, copy_of
from mindpet_lite.graph.tree import cells_by_path, without_inner

# Where a layer keeps the deltas of methods that add nothing to it: an attribute, so that it goes where the layer goes.
_SELECTED = "mindpet_selected"


@dataclasses.dataclass(eq=False)
class Adapter:
    """The record of an adapter; each of its deltas refers to it (`Delta.adapter`).

    Args:
        config: fields of the config it was loaded with, which are written again.
        carried: tensors of its file that have no place in a net, likewise.
        component: of a diffusion pipeline that its file is of, where the net's paths do not say it.
        saved: the base Parameters that belong to it.
        untied: the paths of tied weights of which it saves one place alone, with the path of the other: each has a
            Parameter of its own now.
        shared: the Parameters that its layers share and that its file holds, by name.
        replication: the ranges by which it replicated the net's layers; none where it did not.
        weight: of one of its layers, by which it is known whether the base is another now; where they hold nothing but
            what trains, as norms do, another Parameter of the net.
        base: the hash of that weight when the base's values of `saved` were taken.
        base_load: by what that weight was loaded last.
        replaced_base: the hash before another base was loaded, and by what that was.
        warned: whether the user was told that the base is another.
        told: what the user said of it for other tools, by PEFT's names of the fields: written to its files.
        note: a sentence for the summary.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    saved: list[SavedParameter] = dataclasses.field(default_factory=list)
    component: str = ""
    untied: dict[str, str] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    replication: list[list[int]] = dataclasses.field(default_factory=list)
    weight: Parameter | None = None
    base: str = ""
    base_load: Load | None = None
    replaced_base: tuple[str, Load] | None = None
    warned: bool = False
    told: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def save(self, parameters: Iterable[Parameter]) -> None:
        """Make base Parameters part of the adapter; their values now are kept as the base's."""
        known = {id(item.parameter) for item in self.saved}
        new = {id(parameter): parameter for parameter in parameters if id(parameter) not in known}
        self.saved += [SavedParameter(parameter, copy_of(parameter)) for parameter in new.values()]

    def base_now(self) -> str:
        """Return the hash of the base as it is now; empty where no layer has a weight."""
        return "" if self.weight is None else parameter_hash(self.weight)

    def take_base_values(self) -> None:
        """Take the values in place as the base's."""
        self.base = self.base_now()
        for item in self.saved:
            if item.other is not None:
                item.other, item.loaded = copy_of(item.parameter), False

    def watch(self, found: Iterable[Delta], others: Iterable[Parameter] = ()) -> None:
        """Hear of values that checkpoints give the base and the deltas, while base Parameters belong to the adapter.

        Args:
            found: the deltas of the adapter.
            others: the Parameters of the net, where the adapter is new in it.
        """
        found = list(found)
        if self.weight is None and self.saved and not any(True for _ in self._weights(found)):
            own = {id(item.parameter) for item in self.saved}
            frozen = [item for item in others if id(item) not in own and not item.requires_grad]
            self.weight = max(frozen, key=lambda item: item.size, default=None)
            self.base = self.base_now()
        for parameter, around in self._watched(found):
            watch(parameter, around)

    def unwatch(self, found: Iterable[Delta]) -> None:
        """Undo `watch`."""
        for parameter, around in self._watched(found):
            unwatch(parameter, around)

    def _watched(self, found: Iterable[Delta]) -> Iterator[tuple[Parameter, Around]]:
        found = list(found) if self.saved else []
        saved = {id(item.parameter) for item in self.saved}
        for item in self.saved:
            yield item.parameter, item.value_is_loaded
            yield item.parameter, self._saved_is_loaded
        for delta in found:
            for parameter in delta.delta_parameters().values():
                if id(parameter) not in saved:
                    yield parameter, self._delta_is_loaded
        weights = list(self._weights(found))
        if self.weight is None and weights:
            self.weight = weights[0]
            self.base = self.base_now()
        for weight in weights or ([] if self.weight is None else [self.weight]):
            if id(weight) not in saved:
                yield weight, self._base_is_loaded

    @staticmethod
    def _weights(found: Iterable[Delta]) -> Iterator[Parameter]:
        """Yield the base weights of the layers of some deltas."""
        for delta in found:
            weight = base_weight(delta.base_layer, delta)
            if weight is not None:
                yield weight

    @contextlib.contextmanager
    def _saved_is_loaded(self, data: Tensor, load: Load) -> Iterator[None]:
        """Around a `set_data` of a base Parameter of the adapter: it is the base's where a base's weight came so.

        A base may come in several files, one after the other; what it gave already, another file gives the adapter.
        """
        yield
        if self.base_load is not None:
            for item in self.saved:
                if load.is_same(self.base_load) or not item.is_from_base:
                    item.base_is_loaded(load)

    @contextlib.contextmanager
    def _base_is_loaded(self, data: Tensor, load: Load) -> Iterator[None]:
        """Around a `set_data` of a layer's weight: where nothing has trained, the base is that of the checkpoint."""
        yield
        self.base_load = load
        for item in self.saved:
            item.base_is_loaded(load)
        if all(item.is_untrained() for item in self.saved):
            self.replaced_base, self.base = (self.base, load), self.base_now()

    @contextlib.contextmanager
    def _delta_is_loaded(self, data: Tensor, load: Load) -> Iterator[None]:
        """Around a `set_data` of a delta: the checkpoint is one of the adapter, and so is all that it holds."""
        yield
        for item in self.saved:
            item.adapter_is_loaded(load)
        if self.replaced_base is not None and load.is_same(self.replaced_base[1]):
            self.base, self.replaced_base = self.replaced_base[0], None


def deltas(net: nn.Cell) -> dict[str, Delta]:
    """Return the deltas of `net` by the path of their layer, each once, and bring them up to date.

    Raises:
        ValueError: there is none.
    """
    found = deltas_in(cells_by_path(net))
    if not found:
        trains = [item.name for item in net.trainable_params()]
        some = 0 < len(trains) < len(list(net.get_parameters()))
        raise ValueError("The net has no adapted layer: adapt it with get_pet_model(), or build it with layers such "
                         "as LoRADense. (After merge() the layers are plain.)" + (
                             f" What trains here is {', '.join(trains[:3])}{' and more' if len(trains) > 3 else ''}: "
                             f"TrainableParamsCheckPoint saves that." if some else ""))
    bring_up_to_date(found)
    return found


def bring_up_to_date(found: Mapping[str, Delta]) -> None:
    """Make deltas agree with their settings and their base, whatever was loaded or trained; warn where they did not.

    What a setting says is written again. What was taken from the base is taken again where nothing has trained since.
    """
    changed = [path for path, delta in found.items() if _restore_settings(delta)]
    if changed:
        warn_user(f"The scaling of {some_of(changed)} was not what the settings say, such as lora_alpha and "
                  f"set_lora_scale(): an optimizer or an assignment changed it. It is written again.")
    stale = [path for path, delta in found.items() if _of_another_base(delta)]
    for record in adapters_of(found.values()):
        stale += _saved_of_another_base(record, [delta for delta in found.values() if delta.adapter is record])
    if stale:
        warn_user(f"The base of the net is another than when the adapter was put in, and the adapter has trained or "
                  f"was loaded since. What {some_of(stale)} took from the base is of the weights before. Where it was "
                  f"trained on the base that is in the net now, nothing is to be done; else refresh_base(net) takes it "
                  f"anew.")


def _restore_settings(delta: Delta) -> bool:
    """Write what the settings say where something else stands, and tell whether that was so."""
    wanted = delta.setting_values() if delta.setting_names else {}
    now = {name: getattr(delta, name).asnumpy() for name in wanted}
    if all(np.array_equal(now[name], np.asarray(value, now[name].dtype)) for name, value in wanted.items()):
        return False
    delta.refresh()
    return True


def _of_another_base(delta: Delta) -> bool:
    """Make a start again that has not trained and is of another base; tell, once, of one that has trained."""
    delta.watch_start()
    start = delta.start
    if start is None:
        return False
    start.given = start.load = None
    if not start.is_stale():
        return False
    if start.is_untrained():
        start.make_again()
        return False
    was_warned, start.warned = start.warned, True
    return not was_warned


def _saved_of_another_base(record: Adapter, found: list[Delta]) -> list[str]:
    """Return, once, which base Parameters of an adapter have kept a value of another base than the net has now."""
    record.watch(found)
    now = record.base_now()
    stale = [item.path or item.parameter.name for item in record.saved
             if now != record.base and item.other is not None and item.replaced is None and not item.is_untrained()]
    for item in record.saved:
        item.replaced = None
    record.replaced_base = None
    if not stale:
        record.base = now
    was_warned, record.warned = record.warned, bool(stale)
    return [] if was_warned else stale


def deltas_in(cells: Mapping[str, nn.Cell]) -> dict[str, Delta]:
    """Return the deltas of a net of these cells: adapted cells, and those that methods which add nothing left on cells.

    A cell that is shared stands under its first path. Layers that follow another delta are none of their own.
    """
    found: dict[int, tuple[str, Delta]] = {}
    for path, cell in without_inner(cells).items():
        delta = cell if isinstance(cell, Delta) else vars(cell).get(_SELECTED)
        if delta is not None and not delta.follows:
            found.setdefault(id(cell), (path, delta))
    return dict(found.values())


def select(cell: nn.Cell, delta: Delta | None) -> None:
    """Leave the delta of a method that adds nothing on its layer; None takes it away."""
    if delta is None:
        vars(cell).pop(_SELECTED, None)
    else:
        # Not through Cell.__setattr__, which would take its Parameters for children.
        object.__setattr__(cell, _SELECTED, delta)


def adapters_of(found: Iterable[Delta]) -> list[Adapter]:
    """Return the records of some deltas, each once; a layer that was built by hand has none."""
    return list({id(delta.adapter): delta.adapter for delta in found if delta.adapter is not None}.values())


def shared_by(found: Iterable[Delta], method: str) -> dict[str, Parameter]:
    """Return the Parameters that the layers of a method share, by name."""
    records = adapters_of(delta for delta in found if delta.method == method)
    return {name: item for record in records for name, item in record.shared.items()}


def record_of(found: Iterable[Delta]) -> Adapter:
    """Return the record that deltas of one adapter share; give it to those that have none yet."""
    found = list(found)
    record = next(iter(adapters_of(found)), None) or Adapter()
    for delta in found:
        delta.adapter = delta.adapter or record
    return record


def saved_of(found: Iterable[Delta]) -> dict[int, SavedParameter]:
    """Return the base Parameters that belong to the adapters of some deltas, by their ids."""
    return {id(item.parameter): item for adapter in adapters_of(found) for item in adapter.saved}


def of_method(found: Mapping[str, Delta]) -> Iterator[tuple[str, dict[str, Delta]]]:
    """Yield each method of a net's deltas with its own."""
    for method in dict.fromkeys(delta.method for delta in found.values()):
        yield method, {path: delta for path, delta in found.items() if delta.method == method}
