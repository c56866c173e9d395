"""Small parts that several methods are made of: casts, initial values, parallel strategies."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import Initializer, initializer

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.delta.activation import activation_strategies
from mindpet_lite.delta.values import set_value


def as_type(x: Tensor, dtype: mindspore.dtype, own: mindspore.dtype | None = None) -> Tensor:
    """Cast `x` to `dtype` only where its type differs: a cast to the same type still costs a launch in PyNative mode.

    `own` is the type of `x` where that is known: PyNative mode waits for a result to tell it.
    """
    if own is None:
        own = x.dtype
    if own == dtype:
        return x
    return ops.cast(x, dtype)


def to_rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `x` (*, channels) of this shape as (rows, channels)."""
    return x if len(shape) == 2 else ops.reshape(x, (-1, shape[-1]))


def from_rows(y: Tensor, shape: tuple[int, ...], channels: int) -> Tensor:
    """Return rows of `channels` with the leading axes of `shape`."""
    return y if len(shape) == 2 else ops.reshape(y, shape[:-1] + (channels,))


# What Parameters that hold a layer's weight are called.
WEIGHT_NAMES = {"weight", "embedding_table", "embedding_weight"}


def prefix_of(weight_name: str) -> str:
    """Return what stands before the weight's own name in a Parameter name: the delta's names go beside it."""
    head, _, last = weight_name.rpartition(".")
    return f"{head}." if head and last in WEIGHT_NAMES else ""


def put(parameter: Parameter, value: Tensor) -> None:
    """Write `value` into a Parameter's own memory.

    `Parameter.set_data` gives it other memory. A compiled cell sees that at its next call, a compiled gradient function
    (`mindspore.value_and_grad` in graph mode) never does.
    """
    if parameter.dtype == mindspore.bfloat16 and mindspore.get_context("device_target") == "CPU":
        # No kernel there.
        set_value(parameter, value)
        return
    try:
        ops.assign(parameter, value)
    except RuntimeError:
        # A Parameter that was written to by `p[:] = value` is a view, to which MindSpore assigns nothing.
        set_value(parameter, value)


def check_init(name: str, value: object) -> None:
    """Raise unless `value` is something MindSpore's initializer takes."""
    if isinstance(value, bool) or not isinstance(value, (Tensor, str, Initializer, int, float)):
        raise TypeError(f"{name} must be a Tensor, a number, an initialiser or its name, "
                        f"but got {value!r:.100} of type {type(value).__name__}.")
    if isinstance(value, str):
        try:
            initializer(value, (2, 2))
        except ValueError as error:
            known = [item.__name__.lower() for item in Initializer.__subclasses__()] + ["zeros", "ones", "normal"]
            raise ValueError(f"{name} {value!r} is no initialiser of mindspore.common.initializer."
                             f"{did_you_mean(value, known)}") from error


def initial(name: str, value: Any, shape: tuple[int, ...], dtype: mindspore.dtype) -> Tensor:
    """Return the initial value of a delta, already filled: a net that ran before will not fill it later.

    Raises:
        ValueError: `value` is a Tensor of another shape.
    """
    if isinstance(value, Tensor):
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must be a Tensor of shape {shape}, but got shape {tuple(value.shape)}.")
        # A Tensor from initializer() holds no data yet; and layers made from one Tensor must not share its memory.
        data = value.init_data() if value.has_init else value
        return Tensor(data.astype(mindspore.float32).asnumpy().copy()).astype(dtype)
    if isinstance(value, str) and value == "zeros":
        # As the initialiser, in an eighth of its time.
        return Tensor(np.zeros(shape, np.float32), dtype)
    if isinstance(value, Initializer):
        # The same numbers as by initializer(), which asks numpy for the whole state of its generator before.
        filled = np.empty(shape, np.float32)
        value(filled)
        return Tensor(filled, dtype)
    return initializer(value, shape, dtype).init_data()


def check_strategies(strategies: Mapping[str, object]) -> None:
    """Raise TypeError unless every parallel strategy is None or a tuple with a tuple of ints for each input."""
    for name, strategy in strategies.items():
        good = strategy is None or isinstance(strategy, tuple) and all(
            isinstance(part, tuple) and all(isinstance(item, int) and not isinstance(item, bool) for item in part)
            for part in strategy)
        if not good:
            raise TypeError(f"{name} must be a tuple of tuples of ints, one for each input, but got {strategy!r:.100}.")


def set_strategies(pairs: list[tuple[str, Any, tuple | None]]) -> None:
    """Give operators and activations their strategies: all are checked before the first is set.

    Args:
        pairs: for each the argument's name, the operator or activation (None where the layer lacks it), and the
            strategy (None leaves it alone).

    Raises:
        TypeError: a strategy is no tuple of tuples of ints.
        ValueError: an activation cannot be split; the message starts with the argument's name.
    """
    check_strategies({name: strategy for name, _, strategy in pairs})
    chosen: list[tuple[ops.Primitive, tuple]] = []
    for name, part, strategy in pairs:
        # What a layer lacks (a bias, an activation) has nothing to split.
        if strategy is None or part is None:
            continue
        try:
            chosen.extend([(part, strategy)] if isinstance(part, ops.Primitive) else
                          activation_strategies(part, strategy))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for primitive, strategy in chosen:
        primitive.shard(strategy)
