"""A base Parameter that an adapter saves whole: its value, and the base's."""
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import mindspore
import numpy as np
from mindspore import Parameter, Tensor

from mindpet_lite.delta.base import float64
from mindpet_lite.delta.parts import put
from mindpet_lite.delta.values import Load


@dataclasses.dataclass(eq=False)
class SavedParameter:
    """A base Parameter that belongs to an adapter, such as a new head.

    Args:
        parameter: of the net.
        other: the value that is not in place now: the base's, or the adapter's while that is switched off. None for a
            Parameter that stands in the adapter's file but is the base's own.
        path: that the adapter means, where tied weights have several.
        is_base: whether the base's value is in place.
        file_type: the type that its file has it in; it is written so again where that changes nothing.
        is_from_base: whether a base gave it a value since it belongs to the adapter.
        load: by what an untrained value was last loaded: with a base, or alone as the adapter's.
        replaced: the base's value before another base was loaded, and by what that was.
        loaded: whether a checkpoint of the adapter was loaded.
    """

    parameter: Parameter
    other: Tensor | None
    path: str = ""
    is_base: bool = False
    file_type: np.dtype | None = None
    is_from_base: bool = False
    load: Load | None = None
    replaced: tuple[Tensor, Load] | None = None
    loaded: bool = False

    def switch(self, to_base: bool) -> None:
        """Put the base's value or the adapter's in place, into the Parameter's own memory."""
        if self.other is not None and to_base != self.is_base:
            value, self.other, self.is_base = self.other, copy_of(self.parameter), to_base
            put(self.parameter, value)

    def is_untrained(self) -> bool:
        """Tell whether the adapter's value still is the base's."""
        return self.other is not None and not self.loaded and np.array_equal(float64(self.parameter),
                                                                             float64(self.other), equal_nan=True)

    @contextlib.contextmanager
    def value_is_loaded(self, data: Tensor, load: Load) -> Iterator[None]:
        """Around a `set_data`: the value is the adapter's alone, unless its load turns out to be that of a base."""
        self.load = load if self.is_untrained() else None
        yield

    def base_is_loaded(self, load: Load) -> None:
        """Take it that this load is one of a base: what it gave an untrained Parameter is the base's value too."""
        if self.other is not None and self.load is not None and load.is_same(self.load):
            self.replaced, self.other, self.load = (self.other, load), copy_of(self.parameter), None
            self.is_from_base = True

    def adapter_is_loaded(self, load: Load) -> None:
        """Take it that this load is one of the adapter: what it gave the Parameter is not the base's."""
        self.loaded = True
        if self.replaced is not None and load.is_same(self.replaced[1]):
            self.other, self.replaced = self.replaced[0], None

    def set_trained(self, value: Tensor) -> None:
        """Make `value` the adapter's."""
        if self.is_base:
            self.other = value
        else:
            put(self.parameter, value)

    def trained(self) -> Tensor:
        """Return the adapter's value, whichever is in place."""
        return self.other if self.is_base and self.other is not None else self.parameter


def copy_of(parameter: Parameter) -> Tensor:
    """Return the value in memory of its own: an operator's copy would be lazy, and see the new value."""
    if parameter.dtype == mindspore.bfloat16:
        return Tensor(parameter.astype(mindspore.float32).asnumpy().copy()).astype(mindspore.bfloat16)
    return Tensor(parameter.asnumpy().copy())
