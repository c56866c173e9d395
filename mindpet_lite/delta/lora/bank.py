"""Several LoRA adapters on one layer, between which values switch: a bank.

    y = act(x Wᵀ + b + ((x Aᵀ) ⊙ s) Bᵀ)

A and B are those of all adapters, one below the other along the rank, and s is a vector: for each row of A the weight
of its adapter times alpha / rank. One adapter, a weighted sum, none, or (s with a row for each sample) another one for
each sample are the same kernels; only the values of s differ. The source is Hu et al., 2021, eq. 3, for each adapter.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.base import Delta, overflow
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts import take_types
from mindpet_lite.delta.lora.low_rank import LowRank
from mindpet_lite.delta.lora.slots import Choice, Slot, free_place
from mindpet_lite.delta.parts import as_type, prefix_of, put
from mindpet_lite.delta.values import setting_parameter

ROOM_A, ROOM_B = "mindpet_room_lora_a", "mindpet_room_lora_b"


class LoRABank(Adapted):
    """A layer with several LoRA adapters, each with Parameters of its own or rows of a reserved pair (`room`).

    `mindpet_delta_lora_a` and `_b` are the first adapter's, with ``__<name>`` behind them another's. `scaling` is
    (rows,), or (samples, rows) where samples may have different adapters; it is never trained.
    """

    method: ClassVar[str] = "lora"
    setting_names = ("scaling",)

    scaling: Parameter
    slots: dict[str, Slot]
    choice: Choice
    row_count: int
    # How many samples have a row of `scaling` each; 0 where they share one.
    samples: int
    room: int
    has_dropout: bool
    # The adapter whose Parameters train; empty where none does.
    trained: str

    @classmethod
    def of(cls, layer: LowRank, name: str) -> LoRABank:
        """Return a bank with the adapter of `layer` as its only one, on the same Parameters.

        Raises:
            ValueError: the adapter does not add up with others.
        """
        reason = not_additive(layer)
        if reason:
            raise ValueError(reason)
        bank = cls.empty(layer, layer._plain)
        for path in layer.factor_paths:
            bank.insert_param_to_cell(path, getattr(layer, path))
        bank.slots = {name: Slot(layer.settings(), layer.factor_paths, 0, layer.file_types)}
        bank.choice, bank.unmergeable = Choice({name: layer.strength}), layer.unmergeable
        bank.enabled, bank.adapter = layer.enabled, layer.adapter
        bank.rebuild()
        bank.train_with(name if any(item.requires_grad for item in layer.delta_parameters().values()) else "")
        return bank

    @classmethod
    def empty(cls, layer: nn.Cell, plain: tuple[nn.Cell, ...] = ()) -> LoRABank:
        """Return a bank without an adapter on the base Parameters of `layer`.

        Args:
            layer: plain or adapted.
            plain: the plain layer, where `layer` is adapted and has it.
        """
        bank: LoRABank = cls.on(cls, layer)
        bank.check()
        bank._plain = plain or (() if isinstance(layer, Delta) else (layer,))
        bank.slots, bank.choice, bank.samples, bank.room = {}, Choice({}), 0, 0
        bank.has_dropout, bank.trained = False, ""
        if bank.group_count(bank) > 1:
            bank.unmergeable = "with groups an update makes each output depend on every input channel; use it unmerged."
        take_types(bank, layer)
        bank.rebuild()
        return bank

    # What stands in it.

    def take(self, name: str, layer: LowRank) -> None:
        """Add the adapter of a new layer on the same plain one, with its Parameters under new names.

        Raises:
            ValueError: it does not add up with others.
        """
        reason = not_additive(layer)
        if reason:
            raise ValueError(reason)
        prefix = prefix_of(self.weight.name)
        names = tuple(f"{path}__{name}" for path in layer.factor_paths)
        for old, new in zip(layer.factor_paths, names):
            parameter = getattr(layer, old)
            parameter.name = prefix + new
            self.insert_param_to_cell(new, parameter)
        self.slots[name] = Slot(layer.settings(), (names[0], names[1]), 0, layer.file_types)
        self.rebuild()

    def write(self, name: str, settings: Mapping[str, Any], a: np.ndarray, b: np.ndarray) -> None:
        """Put an adapter into the room, by values.

        Raises:
            ValueError: there is no room for it.
        """
        slot = Slot(dict(settings), None, self.free_place(int(settings["lora_rank"])))
        self._write_room(slot, a, b)
        self.slots[name] = slot
        self.choice.seen.clear()

    def free_place(self, rank: int) -> int:
        """Return the first place of the room where an adapter of this rank fits.

        Raises:
            ValueError: there is none.
        """
        return free_place(self.slots, rank, self.room, self.group_count(self))

    def remove(self, name: str) -> None:
        """Take an adapter out; by values where it stands in the room."""
        slot = self.slots.pop(name)
        self.choice = Choice({own: weight for own, weight in self.choice.weights.items() if own != name})
        if slot.names is None:
            self._write_room(slot, *(np.zeros(shape) for shape in self._shapes(slot.rank)))
            return
        for path in slot.names:
            delattr(self, path)
        self.rebuild()

    def factors(self, name: str) -> dict[str, np.ndarray]:
        """Return an adapter's A and B in float32, by the names that a layer with it alone has for them."""
        slot = self.slots[name]
        return dict(zip(self.factor_names, self._factors(slot)))

    def parameters_of(self, name: str) -> dict[str, Parameter]:
        """Return an adapter's Parameters by the names that a layer with it alone has; none where it is in the room."""
        names = self.slots[name].names
        return {} if names is None else {own: getattr(self, path)
                                         for own, path in zip(self.factor_names, names)}

    def room_problem(self, room: int) -> str:
        """Return why the room cannot have this rank, or nothing."""
        groups = self.group_count(self)
        used = sum(slot.rank for slot in self.slots.values() if slot.names is None)
        if room % groups:
            return f"the rank must be divisible by its {groups} groups."
        return f"adapters of rank {used} stand in it." if used > room else ""

    def reserve(self, room: int, samples: int) -> None:
        """Make room for adapters of `room` ranks together, and a row of `scaling` for each of `samples`.

        What stood in the room before stays where it is.
        """
        before = [(slot, self._factors(slot)) for slot in self.slots.values() if slot.names is None]
        if room != self.room:
            prefix = prefix_of(self.weight.name)
            for path, shape in zip((ROOM_A, ROOM_B), self._shapes(room)):
                if path in self._room_names():
                    delattr(self, path)
                setattr(self, path, Parameter(Tensor(np.zeros(shape, np.float32)), prefix + path, requires_grad=False))
            self.room = room
        self.samples = samples
        self.rebuild()
        for slot, factors in before:
            self._write_room(slot, *factors)

    # Which of them count.

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Let these adapters count, each times its number, for all samples; by values."""
        self.choice.weights = {name: float(value) for name, value in weights.items() if name in self.slots}
        self.choice.names = None
        self.refresh()

    def set_samples(self, names: Sequence[str | None]) -> None:
        """Let another adapter count for each sample, None for the base; by values."""
        self.choice.names = tuple(name if name in self.slots else None for name in names)
        self.refresh()

    def refresh(self) -> None:
        """Write the numbers of `scaling`; a running graph sees them at its next call."""
        choice = self.choice
        key = (tuple(choice.weights.items()), choice.names, self.strength, self.enabled)
        if key not in choice.seen:
            choice.remember(key, Tensor(self.setting_values()["scaling"]))
        put(self.scaling, choice.seen[key])

    def setting_values(self) -> dict[str, Any]:
        """Return the numbers of `scaling`, or zeros where switched off."""
        scales = dict(zip(self.slots, self.row_scales()))
        strength, none = self.strength if self.enabled else 0.0, np.zeros(self.row_count, np.float32)
        if self.choice.names is not None:
            table = np.stack([none if name is None else scales[name] for name in self.choice.names])
            return {"scaling": (strength * table).astype(np.float32)}
        row = strength * sum((weight * scales[name] for name, weight in self.choice.weights.items()), none)
        return {"scaling": np.tile(row, (self.samples, 1)).astype(np.float32) if self.samples
                else row.astype(np.float32)}

    def setting_parameters(self) -> dict[str, Parameter]:
        """Return the scaling and the room, which never train."""
        return {"scaling": self.scaling, **{path: getattr(self, path) for path in self._room_names()}}

    def overflows(self, strength: float) -> str:
        """Return why the scaling cannot be that of this strength, or nothing."""
        largest = max((abs(self.choice.weights.get(name, 0.0)) * slot.scale for name, slot in self.slots.items()),
                      default=0.0)
        return overflow("strength times lora_alpha / lora_rank", strength * largest,
                        (mindspore.float32, self._compute_type()))

    # The layer.

    def rebuild(self) -> None:
        """Make what the structure says anew: names, operators, `scaling`. The graph must compile again."""
        own = [slot.names for slot in self.slots.values() if slot.names is not None]
        self.pairs = (*own, *([(ROOM_A, ROOM_B)] if self.room else []))
        self.delta_names = tuple(path for names in own for path in names)
        ranks = [getattr(self, a).shape[0] for a, _ in self.pairs]
        self.row_count = sum(ranks)
        # A group of channels is followed by the next, so in each the adapters' rows stand one after the other.
        groups, ends = self.group_count(self), np.cumsum([0, *ranks])
        self.order = [int(begin) + group * (rank // groups) + row for group in range(groups)
                      for begin, rank in zip(ends, ranks) for row in range(rank // groups)]
        self.row_order = Tensor(np.array(self.order, np.int32))
        self.has_groups = groups > 1
        if self.row_count:
            self.add_low_rank_operators(self.row_count)
        self.choice = Choice(self.choice.weights)
        value = Tensor(self.setting_values()["scaling"])
        if hasattr(self, "scaling") and self.scaling.shape == value.shape:
            self.refresh()
        else:
            self.scaling = setting_parameter(value, prefix_of(self.weight.name) + "scaling")

    def train_with(self, name: str) -> None:
        """Let this adapter's Parameters train, none where it is empty; in training its dropout is that of all."""
        if name == self.trained:
            return
        self.trained = name
        for other in self.slots:
            for parameter in self.parameters_of(other).values():
                parameter.requires_grad = other == name
        rate = self.slots[name].settings.get("lora_dropout", 0.0) if name in self.slots else 0.0
        self.has_dropout = rate > 0
        if self.has_dropout:
            self.lora_dropout = delta_dropout(rate)

    def checked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the input, having refused one whose first axis does not count the samples."""
        if self.samples > 0 and (len(shape) < 2 or shape[0] != self.samples):
            raise ValueError("a layer with one adapter for each sample needs an input whose first axis counts as many "
                             "samples as adapters_for_samples() or reserve_adapters() was given")
        return shape

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the output before the activation, the updates added to what the weight makes of the input."""
        y = self.affine(h, self.own_weight(dtype), dtype)
        if self.row_count == 0:
            return y
        if self.has_dropout:
            again = self.lora_dropout(again)
        low = self._scaled(self._low(again, dtype), as_type(self.scaling, dtype))
        b = [getattr(self, names[1]) for names in self.pairs]
        return ops.add(y, self.widen(low, ops.concat(b, 1) if len(b) > 1 else b[0], dtype))

    def _low(self, h: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what all rows of A make of the input."""
        a = [getattr(self, names[0]) for names in self.pairs]
        if len(a) == 1:
            return self.narrow(h, a[0], dtype)
        if self.takes_ids:
            # The tables stay where they are: only the columns that are looked up are put together.
            return ops.concat([self.narrow(h, part, dtype) for part in a], 0)
        whole = ops.concat(a, 0)
        return self.narrow(h, ops.gather(whole, self.row_order, 0) if self.has_groups else whole, dtype)

    def _scaled(self, low: Tensor, scaling: Tensor) -> Tensor:
        """Return the low-rank activations times the number of each row, or of each row and sample."""
        count = self.samples
        if self.takes_ids:
            if count:
                by_sample = ops.expand_dims(ops.transpose(scaling, (1, 0)), 2)
                return ops.reshape(ops.reshape(low, (self.row_count, count, -1)) * by_sample, low.shape)
            return low * ops.expand_dims(scaling, 1)
        if self.dims:
            return low * ops.reshape(scaling, (count or 1, self.row_count) + (1,) * self.dims)
        if count:
            return ops.reshape(ops.reshape(low, (count, -1, self.row_count)) * ops.expand_dims(scaling, 1), low.shape)
        return low * scaling

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return the weight with every adapter that counts, each times its weight.

        Raises:
            ValueError: samples have different adapters.
        """
        if self.choice.names is not None:
            raise ValueError("samples have different adapters, which no single weight holds: leave the block of "
                             "adapters_for_samples() first.")
        whole, strength = self.weight_numbers(), self.strength if self.enabled else 0.0
        # What is not finite is for the caller to refuse, by name.
        with np.errstate(over="ignore", invalid="ignore"):
            for name, weight in self.choice.weights.items():
                a, b = self.factors(name).values()
                product = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
                number = np.float32(strength * weight * self.slots[name].scale)
                whole = whole + number * (product.T if self.out_axis else product).reshape(whole.shape)
        return {self.absorbing(): self.as_weight(whole)}

    def settings(self) -> dict[str, Any]:
        """Return the settings of each adapter by its name."""
        return {name: dict(slot.settings) for name, slot in self.slots.items()}

    def extend_repr(self) -> str:
        """Show the adapters and their ranks."""
        ranks = ", ".join(f"{name}: {slot.rank}" for name, slot in self.slots.items())
        return f"{super().extend_repr()}, adapters={{{ranks}}}" + (f", room={self.room}" if self.room else "")

    # The numbers.

    @property
    def factor_names(self) -> tuple[str, str]:
        """The names of A and B in a layer with one adapter."""
        between = "embedding_" if self.takes_ids else ""
        return f"mindpet_delta_lora_{between}a", f"mindpet_delta_lora_{between}b"

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.narrow_shape(self, rank), self.widen_shape(self, rank)

    def _room_names(self) -> tuple[str, ...]:
        return (ROOM_A, ROOM_B) if self.room else ()

    def _write_room(self, slot: Slot, a: np.ndarray, b: np.ndarray) -> None:
        rows, columns = slot.places(self.room, self.group_count(self))
        whole_a, whole_b = (getattr(self, path).asnumpy().copy() for path in (ROOM_A, ROOM_B))
        whole_a[rows], whole_b[:, columns] = a, b
        put(getattr(self, ROOM_A), Tensor(whole_a))
        put(getattr(self, ROOM_B), Tensor(whole_b))

    def _factors(self, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
        if slot.names is not None:
            a, b = (getattr(self, path).astype(mindspore.float32).asnumpy() for path in slot.names)
            return a, b
        rows, columns = slot.places(self.room, self.group_count(self))
        return getattr(self, ROOM_A).asnumpy()[rows], getattr(self, ROOM_B).asnumpy()[:, columns]

    def row_scales(self) -> np.ndarray:
        """Return what multiplies each row of A for each adapter alone: (adapters, rows), in the order of `slots`."""
        found, begin = np.zeros((len(self.slots), self.row_count), np.float32), 0
        for index, slot in enumerate(self.slots.values()):
            if slot.names is not None:
                found[index, begin:begin + slot.rank] = slot.scale
                begin += slot.rank
        for index, slot in enumerate(self.slots.values()):
            if slot.names is None:
                rows, _ = slot.places(self.room, self.group_count(self))
                found[index, begin + rows] = slot.scale
        return found[:, self.order]


def not_additive(layer: Any) -> str:
    """Return why the adapter of a layer cannot stand beside others, or nothing."""
    if not isinstance(layer, LowRank):
        return f"a {type(layer).__name__} holds no adapter that adds up with others."
    if layer.use_dora:
        return "DoRA scales the layer's own weight, so it does not add up with other adapters."
    if layer.has_lora_bias:
        return "its B has a bias (lora_bias), which a bank has no place for."
    return layer.fixed and f"it does not stand beside other adapters: {layer.fixed}"
