"""Several adapters on one net, by name: values switch between them while compiled graphs run."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mindspore import nn

from mindpet_lite.config import as_config
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.formats.combine import combine
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.adapters import record_of
from mindpet_lite.graph.inject import get_pet_model, with_default_targets
from mindpet_lite.graph.load_named import put_state
from mindpet_lite.graph.match import targets
from mindpet_lite.graph.named import (
    banks_of,
    check_names,
    check_new,
    keep,
    named,
    plain_cells,
    put_beside,
    set_weights,
    state_of,
)
from mindpet_lite.graph.strength import set_lora_scale
from mindpet_lite.graph.tree import replace
from mindpet_lite.graph.turns import adds_up, make_way, take_turn


def add_adapter(net: nn.Cell, name: str, config: DeltaConfig | Mapping[str, Any]) -> nn.Cell:
    """Put a new adapter beside those that the net has, in place.

    It counts from `set_adapter` on, which also lets it train; the first adapter of a net counts at once. Layers
    that other adapters lack are adapted; where this one lacks a layer it is the base there. Adapters of LoRA stand side
    by side; those that do not add up (DoRA, other methods, modules_to_save) take turns: the new one waits for its own.
    All nets of the process compile again at their next call.

    Args:
        net: a net with or without adapters.
        name: of letters, digits, ``_`` and ``-``.
        config: of the adapter.

    Returns:
        `net`.

    Raises:
        TypeError, ValueError: the name is taken or none, or the config does not fit the net. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.add_adapter(net, "style", mp.LoraConfig(2, 4, target_modules=["0", "2"]))
        >>> mp.set_adapter(net, "style")
        >>> mp.active_adapters(net)
        {'style': 1.0}
    """
    config, known = as_config(config), named(net)
    check_new(name, known)
    if not known.names and not banks_of(net):
        get_pet_model(net, config)
        known = named(net)
        known.records, known.active, known.live = {name: known.records.popitem()[1]}, {name: 1.0}, name
        known.trainable = set() if config.inference_mode else {name}
        keep(net, known)
        return net
    if known.turns or not adds_up(net, config):
        make_way(net, known, name, lambda: get_pet_model(net, config))
        return net
    cells = plain_cells(net)
    config, note = with_default_targets(config, cells)
    chosen, problems = targets(cells, config)
    new: dict[str, Delta] = {}
    for path in chosen:
        try:
            new[path] = config.for_layer(path).adapt(cells[path])
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ValueError(f"The adapter {name!r} does not fit the net, which is unchanged:\n  {listed(problems)}")
    record = record_of(new.values())
    record.told, record.note = config.told(), note
    put_beside(net, known, name, new, record)
    if not config.inference_mode:
        known.trainable.add(name)
    return net


def set_adapter(net: nn.Cell, names: str | Mapping[str, float], train: bool | None = None) -> None:
    """Let one adapter count, or several with their weights, and no other, from the next call on; nothing compiles anew.

    Given one name, only that one's Parameters train from now on: make the optimizer afterwards. Adapters that do not
    add up change places, by values where they have the same layers and settings; otherwise the net's graphs compile
    again.

    Args:
        net: a net with adapters.
        names: a name, or weights by name; an empty mapping is the base.
        train: of one name whether it trains; without it the adapters train that were made by `get_pet_model` or
            `add_adapter`, and those that were loaded by name do not. Default: None.

    Raises:
        TypeError: a weight is no number.
        ValueError: a name is none of the net's; a weight is not finite; several are named that do not add up. Nothing
            is changed.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.add_adapter(net, "style", mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> mp.set_adapter(net, "style")           # this one counts, and trains
        >>> mp.set_adapter(net, {"default": 0.5, "style": 1.0})     # both count
        >>> mp.set_adapter(net, {})                # the base
        >>> mp.active_adapters(net)
        {}
    """
    known, banks = named(net), banks_of(net)
    weights = {names: 1.0} if isinstance(names, str) else dict(names)
    check_names(weights, known)
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"the weight of adapter {name!r} must be a number, but got {weight!r:.60}.")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name!r} must be finite, but got {weight}.")
    known.active = _without_banks(net, known.live, weights) if not banks else {
        name: float(weight) for name, weight in weights.items()}
    for bank in banks.values():
        bank.set_weights(weights)
    if isinstance(names, str):
        trained = names if train or train is None and names in known.trainable else ""
        for bank in banks.values():
            bank.train_with(trained)
    keep(net, known)


def _without_banks(net: nn.Cell, live: str, weights: Mapping[str, float]) -> dict[str, float]:
    """Give the net its adapter's weight, having changed places where another is asked for."""
    if len(weights) > 1:
        raise ValueError(f"The adapters of this net do not add up, so only one of {', '.join(weights)} can count at a "
                         f"time.")
    for name in weights:
        if name != live:
            take_turn(net, named(net), name)
    set_lora_scale(net, float(next(iter(weights.values()), 0.0)))
    return {name: float(weight) for name, weight in weights.items()}


def active_adapters(net: nn.Cell) -> dict[str, float]:
    """Return the weights of the adapters that count, by name; empty where the net is its base.

    Args:
        net: a net with or without adapters.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.add_adapter(net, "style", mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> mp.set_adapter(net, {"default": 0.3, "style": 0.7})
        >>> mp.active_adapters(net)
        {'default': 0.3, 'style': 0.7}
    """
    return dict(named(net).active)


def delete_adapter(net: nn.Cell, name: str) -> None:
    """Take an adapter out of a net; in the running graph where it stands in reserved room.

    Args:
        net: a net with several adapters.
        name: of the adapter that goes.

    Raises:
        ValueError: the net has no such adapter; or it is the only one, for which there are merge() and a fresh net.
            Nothing is changed.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.add_adapter(net, "style", mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> mp.delete_adapter(net, "style")
        >>> mp.active_adapters(net)
        {'default': 1.0}
    """
    known, banks = named(net), banks_of(net)
    check_names([name], known)
    if name in known.turns:
        known.turns.pop(name)
        return
    if not banks:
        raise ValueError(f"{name!r} is the adapter in the net: set_adapter() another first; if it is the only one, "
                         f"merge() it or build the net without it. (reserve_adapters() makes room in which adapters "
                         f"come and go.)")
    in_room = all(bank.slots[name].names is None for bank in banks.values() if name in bank.slots)
    for bank in banks.values():
        if name in bank.slots:
            bank.remove(name)
    known.records.pop(name)
    known.active.pop(name, None)
    if not in_room:
        # Another structure: the graphs that hold the adapter's Parameters go.
        replace(net, {})
    set_weights(net, known)


def combine_adapters(net: nn.Cell, name: str, names: Sequence[str], weights: Sequence[float], how: str = "svd",
                     rank: int | None = None, density: float | None = None, majority_sign: str = "total",
                     seed: int = 0) -> nn.Cell:
    """Put a new adapter beside those of a net that is a combination of some of them; they stay as they are.

    Args:
        net: a net with adapters of LoRA.
        name: of the new one, which is frozen and counts from `set_adapter` on.
        names: of those to combine.
        weights: a finite number for each.
        how: "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", or one of the last four with
            "_svd" behind it: see `mindpet_lite.formats.combine.combine`. Default: "svd".
        rank: of the result, for svd; positive; the highest of the adapters' without it. Default: None.
        density: the share of numbers that pruning leaves, in (0, 1]. Default: None.
        majority_sign: "total" or "frequency", for ties. Default: "total".
        seed: of dare's random numbers; 0 or more. Default: 0.

    Returns:
        `net`.

    Raises:
        ValueError: a name is none of the net's, or the new one is taken; or the adapters cannot be combined so. The net
            is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.add_adapter(net, "style", mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.combine_adapters(net, "both", ["default", "style"], [0.5, 0.5], how="linear")
        >>> mp.set_adapter(net, "both")
        >>> mp.active_adapters(net)
        {'both': 1.0}
    """
    known = named(net)
    check_new(name, known)
    check_names(names, known)
    if known.turns or not banks_of(net):
        raise ValueError("The net has no two adapters side by side that could be combined.")
    state = combine({one: state_of(net, one) for one in names}, weights, how, rank, density, majority_sign, seed)
    return put_state(net, state, f"the combination {name!r}", name, known)
