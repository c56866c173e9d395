"""Values that are not the user's to train or load alone: what settings say, and what a start took from the base."""
from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor

from mindpet_lite.arguments import user_lines, warn_user

if TYPE_CHECKING:
    from mindpet_lite.delta.base import Delta

_SAMPLE = 1024

Frozen = TypeVar("Frozen", bound="FrozenParameter")


class FrozenParameter(Parameter, Tensor):
    """A Parameter that never trains, such as a projection that layers share. Checkpoints are loaded into it as usual.

    Made by `frozen_parameter`, because `Parameter` gives its objects a class of its own.
    """

    @property
    def requires_grad(self) -> bool:
        """False, whatever is set: ``p.requires_grad = True`` for all Parameters of a net must not train it."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenParameter:
        return _of_class(type(self), super().__deepcopy__(memo))


class SettingParameter(FrozenParameter):
    """A Parameter that holds what the settings of its layer say, such as a scale. It never trains.

    `set_data`, with which checkpoints are loaded, leaves its value; `mindpet_lite.delta.parts.put` writes it. Made by
    `setting_parameter`.
    """

    def set_data(self, data: Tensor | float, slice_shape: bool = False) -> SettingParameter:
        """Keep the value, and warn where `data` is another."""
        if not np.array_equal(to_numpy(data), to_numpy(self)):
            warn_user("A checkpoint holds another scaling for an adapted layer than the settings of this net say. The "
                      "net keeps its own. Where it was trained with another lora_alpha or lora_rank, adapt the net "
                      "with those; a strength is set with set_lora_scale().")
        return self

    def assign_value(self, value: Tensor) -> SettingParameter:
        """Keep the value, as `set_data` does: `Cell.load_state_dict` loads so."""
        return self.set_data(value)


def setting_parameter(value: Tensor | float, name: str) -> SettingParameter:
    """Return a new Parameter of a value that the settings say."""
    return _of_class(SettingParameter, Parameter(value, name=name, requires_grad=False))


def frozen_parameter(value: Tensor, name: str) -> FrozenParameter:
    """Return a new Parameter that never trains."""
    return _of_class(FrozenParameter, Parameter(value, name=name, requires_grad=False))


def _of_class(kind: type[Frozen], parameter: Parameter) -> Frozen:
    parameter.__class__ = kind
    return parameter


# The functions of MindSpore that load many values, and what they call them.
_GIVEN = {"load_param_into_net": "parameter_dict", "load_state_dict": "state_dict"}


class Load:
    """By what a value is loaded: what `load_param_into_net` or `load_state_dict` was given, else the line that does it.

    Made while it goes on. It keeps nothing of the checkpoint alive.
    """

    def __init__(self) -> None:
        frame: FrameType | None = sys._getframe(1)
        self.line = user_lines()
        self.parameter: Callable[[], Tensor | None] | None = None
        while frame is not None and self.parameter is None:
            given = frame.f_locals.get(_GIVEN.get(frame.f_code.co_name, ""))
            if given:
                self.parameter = weakref.ref(next(iter(given.values())))
            frame = frame.f_back

    def is_same(self, other: Load) -> bool:
        """Tell whether another value comes from the same checkpoint, or line."""
        if self.parameter is None or other.parameter is None:
            return self.parameter is other.parameter and self.line == other.line
        parameter = self.parameter()
        return parameter is not None and parameter is other.parameter()


# A context around a call of `set_data` or `assign_value` with a value.
Around = Callable[[Tensor, Load], AbstractContextManager[None]]


class _Watched:
    """Stands before `set_data` and `assign_value` of a Parameter: its watchers hear of a value from a checkpoint."""

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter
        self.watchers: list[Around] = []
        # `Parameter.set_data` calls `assign_value`, of which nobody is to hear.
        self.is_quiet = False

    def set_data(self, data: Any, slice_shape: bool = False) -> Parameter:
        with self._heard(data):
            Parameter.set_data(self.parameter, data, slice_shape)
        return self.parameter

    def assign_value(self, value: Any) -> Parameter:
        with self._heard(value):
            Tensor.assign_value(self.parameter, value)
        return self.parameter

    @contextmanager
    def _heard(self, data: Any) -> Iterator[None]:
        if self.is_quiet:
            yield
            return
        load = Load()
        with ExitStack() as stack:
            for around in self.watchers:
                stack.enter_context(around(data, load))
            with self.quiet():
                yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Let nobody hear of values inside the block."""
        before, self.is_quiet = self.is_quiet, True
        try:
            yield
        finally:
            self.is_quiet = before


def watch(parameter: Parameter, around: Around) -> None:
    """Let `around` be entered around each `set_data` and `assign_value` of a Parameter. Copies are not watched."""
    watched = _watched(parameter)
    if watched is None:
        watched = _Watched(parameter)
        parameter.set_data, parameter.assign_value = watched.set_data, watched.assign_value
    if around not in watched.watchers:
        watched.watchers.append(around)


def unwatch(parameter: Parameter, around: Around) -> None:
    """Undo `watch`."""
    watched = _watched(parameter)
    if watched is not None and around in watched.watchers:
        watched.watchers.remove(around)
        if not watched.watchers:
            del parameter.set_data, parameter.assign_value


def _watched(parameter: Parameter) -> _Watched | None:
    found = getattr(vars(parameter).get("set_data"), "__self__", None)
    return found if isinstance(found, _Watched) and found.parameter is parameter else None


def set_value(parameter: Parameter, value: Tensor, slice_shape: bool = False) -> None:
    """Give a Parameter a value as `set_data` does, without a word to those who watch it."""
    watched = _watched(parameter)
    with watched.quiet() if watched else nullcontext():
        Parameter.set_data(parameter, value, slice_shape)


class Start:
    """What a delta's start took from its layer's weight, so that the start is made again where the weight changes.

    A base may be loaded after a delta was put on it. A start that is still as it was made is made again then. One that
    has trained stays, and `is_stale` tells that it belongs to other weights.

    Args:
        delta: whose `base_parameter()` is not None, and whose values are those of the start.
    """

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        # By what the weight was loaded last, and what that gave, if the start was made again.
        self.load: Load | None = None
        self.given: Tensor | None = None
        self.warned = False
        self.note()
        self.digest = self._digest()

    def watch(self) -> None:
        """Hear of values that come from checkpoints."""
        watch(self._base(), self._base_is_loaded)
        for parameter in self.delta.delta_parameters().values():
            watch(parameter, self._delta_is_loaded)

    def unwatch(self) -> None:
        """Undo `watch`."""
        unwatch(self._base(), self._base_is_loaded)
        for parameter in self.delta.delta_parameters().values():
            unwatch(parameter, self._delta_is_loaded)

    def is_untrained(self) -> bool:
        """Tell whether the delta's values still are those of the start, by their digest."""
        return self._digest() == self.digest

    def is_stale(self) -> bool:
        """Tell whether the weight is another than the delta belongs to, by some of its values."""
        return not np.array_equal(self._sample(), self.sample, equal_nan=True)

    def note(self) -> None:
        """Take it that the delta belongs to the weight as it is now."""
        self.sample, self.warned = self._sample(), False

    def make_again(self) -> None:
        """Make the start from the weight as it is now."""
        self.delta.start_again()
        self.note()
        self.digest = self._digest()

    @contextmanager
    def _base_is_loaded(self, data: Tensor, load: Load) -> Iterator[None]:
        untrained = self.is_untrained()
        yield
        self.load, self.given = load, None
        if untrained:
            self.make_again()
            self.given = data

    @contextmanager
    def _delta_is_loaded(self, data: Tensor, load: Load) -> Iterator[None]:
        yield
        with_base = self.load is not None and load.is_same(self.load)
        if with_base and self.given is not None:
            # The checkpoint is one of an adapted net: its weight is what such a start leaves of a base, not a base.
            set_value(self._base(), self.given)
        self.given = None
        if with_base or load.parameter is not None:
            self.note()

    def _base(self) -> Parameter:
        base = self.delta.base_parameter()
        if base is None:
            raise ValueError(f"The start of {type(self.delta).__name__} takes nothing from its base.")
        return base

    def _sample(self) -> np.ndarray:
        values = to_numpy(self._base()).reshape(-1)
        return values[np.linspace(0, values.size - 1, min(_SAMPLE, values.size)).astype(np.int64)]

    def _digest(self) -> str:
        whole = hashlib.sha256()
        for parameter in self.delta.delta_parameters().values():
            whole.update(to_numpy(parameter).tobytes())
        return whole.hexdigest()


def to_numpy(value: Any) -> np.ndarray:
    """Return a Tensor, or what numpy reads, as numpy; bfloat16, which numpy lacks, as float32 (the same numbers)."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.init_data() if value.has_init else value
    return (value.astype(mindspore.float32) if value.dtype == mindspore.bfloat16 else value).asnumpy()
