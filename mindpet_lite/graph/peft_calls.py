"""PEFT's names of what this package calls otherwise, and an adapter as arrays."""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
from mindspore import nn

from mindpet_lite.delta import METHODS
from mindpet_lite.formats.adapters import Adapter as Source
from mindpet_lite.formats.adapters import as_peft, from_peft
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.freeze import TrainableReport, count
from mindpet_lite.graph.load import install
from mindpet_lite.graph.merge import merge
from mindpet_lite.graph.save import state_to_save
from mindpet_lite.graph.strength import adapters_disabled
from mindpet_lite.graph.tree import require_cell


def print_trainable_parameters(net: nn.Cell) -> TrainableReport:
    """Print and return how many elements of a net train, in PEFT's form.

    Args:
        net: any Cell.

    Raises:
        TypeError: `net` is no Cell.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> report = mp.print_trainable_parameters(net)
        trainable params: 24 || all params: 82 || trainable%: 29.2683
    """
    report = count(require_cell(net))
    print(report)
    return report


def merge_and_unload(net: nn.Cell) -> nn.Cell:
    """Return the net with its adapters merged: `mindpet_lite.merge` by PEFT's name.

    Args:
        net: a net with adapted layers.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.merge_and_unload(net)
        >>> type(net[0]).__name__
        'Dense'
    """
    return merge(net)


def disable_adapter(net: nn.Cell) -> AbstractContextManager[nn.Cell]:
    """Return a block inside which the net is its base: `mindpet_lite.adapters_disabled` by PEFT's name.

    Args:
        net: a net with adapted layers.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> with mp.disable_adapter(net):
        ...     y = net(x)                         # the base's output
    """
    return adapters_disabled(net)


def get_adapter_state(net: nn.Cell, name: str | None = None) -> dict[str, np.ndarray]:
    """Return what `save_adapter` would write as arrays, by the keys of PEFT's file.

    It is a copy: training on does not change it. It is PEFT's `get_peft_model_state_dict`.

    Args:
        net: a net with adapted layers.
        name: of one adapter, where the net has several. Default: None.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no adapter, or not this one, or PEFT has no place for a part of it.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> {key: value.shape for key, value in mp.get_adapter_state(net).items()}
        {'base_model.model.0.lora_A.weight': (2, 4), 'base_model.model.0.lora_B.weight': (8, 2)}
    """
    tensors, _ = as_peft(state_to_save(net, name), METHODS)
    return {key: np.array(value) for key, value in tensors.items()}


def set_adapter_state(net: nn.Cell, state: Mapping[str, np.ndarray]) -> nn.Cell:
    """Give the net's adapter the values that `get_adapter_state` returned, all of them or none, in place.

    What trains stays as it is. It is PEFT's `set_peft_model_state_dict`.

    Args:
        net: adapted as the net was that the state is of.
        state: arrays by the keys of PEFT's file.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell, or `state` no mapping of texts to arrays.
        ValueError: the net has no adapter or several, or a key or a shape is not its adapter's. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> state = mp.get_adapter_state(net)
        >>> net = mp.set_adapter_state(net, {key: 2 * value for key, value in state.items()})
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) and isinstance(value, np.ndarray)
                                                 for key, value in state.items()):
        raise TypeError(f"state must be a mapping from PEFT's keys to numpy arrays, as get_adapter_state() returns it, "
                        f"but got {type(state).__name__}.")
    own, config = as_peft(state_to_save(net, None), METHODS)
    wrong = [f"missing: {key}." for key in own if key not in state] + [
        f"unexpected: {key}." for key in state if key not in own] + [
        f"{key} has the shape {value.shape}, but the net's has {own[key].shape}." for key, value in state.items()
        if key in own and value.shape != own[key].shape]
    if wrong:
        raise ValueError("The state does not fit the net, which is unchanged:\n  " + listed(wrong))
    return install(net, Source(from_peft(state, config, METHODS), "peft", ()), "the state", trainable="keep")
