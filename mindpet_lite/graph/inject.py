"""Adapt the layers of an existing net in place."""
from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mindspore import nn

from mindpet_lite.config import as_config
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.values import to_numpy
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.adapters import deltas_in, shared_by
from mindpet_lite.graph.freeze import with_lists
from mindpet_lite.graph.match import targets
from mindpet_lite.graph.modules_to_save import saved_by, tied_problems
from mindpet_lite.graph.parameters import apply_trains, parameters_with, what_trains
from mindpet_lite.graph.put_in import adapt, followers_of, put_in, start_problems
from mindpet_lite.graph.ranks import same_on_all_ranks
from mindpet_lite.graph.replicate import replicated
from mindpet_lite.graph.tree import cells_by_path, without_inner
from mindpet_lite.names.default_targets import family_of


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector: all that is made meanwhile stays, and walking it again and again takes long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():
                # Together they only move what is new to the old objects; else the next collection walks it once more.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def get_pet_model(net: nn.Cell, config: DeltaConfig | Mapping[str, Any] | str | os.PathLike[str]) -> nn.Cell:
    """Adapt the layers that `config` names, in place, and freeze everything but the deltas.

    Works on any Cell, before or after it was first called, in graph mode and PyNative. Base parameters keep their
    names and values, and with the default initialisation the output is unchanged bit for bit. Make the optimizer
    afterwards, from ``net.trainable_params()``.

    Drops the compiled graphs of all nets of the process: each compiles again at its next call.

    In a distributed job what trains starts with the values of rank 0, see `graph.ranks.same_on_all_ranks`. Call it on
    every process, after ``mindspore.communication.init()``.

    Args:
        net: the net to adapt; it is changed in place and returned.
        config: a config such as `mindpet_lite.LoraConfig`, a mapping with `pet_type` and its fields, or the
            path of a YAML file with a `pet_config` block.

    Returns:
        `net`.

    Raises:
        TypeError, ValueError: the config is wrong, or it names layers that do not exist, cannot be adapted or are
            adapted already; or the processes of a data-parallel job adapt different layers. All problems stand in
            one message, and the net is unchanged.
        RuntimeError: another process of a distributed job did not answer. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> before = net(x)
        >>> net = mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["0"]))
        >>> bool((net(x) == before).all())         # training starts at the base
        True
        >>> [item.name for item in net.trainable_params()]
        ['0.mindpet_delta_lora_a', '0.mindpet_delta_lora_b']
        >>> optimizer = nn.Adam(net.trainable_params(), 1e-3)      # afterwards, not before
    """
    cells_by_path(net)
    config = as_config(config)
    with replicated(net, config.replication):
        _adapt(net, config)
    return net


def _adapt(net: nn.Cell, config: DeltaConfig) -> None:
    """Adapt the layers that `config` names, in place."""
    cells = cells_by_path(net)
    config, note = with_default_targets(config, cells)
    chosen, problems = _targets(cells, config)
    adapted: dict[str, Delta] = {}
    configs: dict[str, DeltaConfig] = {}
    for path in chosen:
        try:
            configs[path] = config.for_layer(path)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
    present = [delta for delta in deltas_in(cells).values() if delta.method == config.pet_type]
    problems += config.beside(present)
    shared = shared_by(present, config.pet_type)
    with _uncollected():
        try:
            made = type(config).share({path: (cells[path], own) for path, own in configs.items()},
                                      {name: to_numpy(item) for name, item in shared.items()})
            shared = {name: shared.get(name, item) for name, item in made.items()}
        except (TypeError, ValueError) as error:
            problems.append(str(error))
        for path, own in configs.items():
            try:
                adapted[path] = adapt(own.holding(shared), path, cells)
            except (TypeError, ValueError) as error:
                problems.append(f"{path}: {error}")
    if isinstance(adapted.get(""), nn.Cell):
        problems.append("the net itself is the layer to adapt, and it cannot be replaced in place: "
                        "use the adapted layer's own from_dense(), or wrap it in a cell.")
    problems += [*start_problems(net, adapted), *tied_problems(net, adapted, config.keeps_ties)]
    saved, ties = saved_by(config, net, cells, chosen, problems)
    followers = followers_of(adapted, cells, [*chosen.values(), *(cell for _, cell in ties.values())], problems)
    parameters = parameters_with(net, adapted)
    trains = what_trains(parameters, cells, adapted.values(), saved)
    try:
        trains = with_lists(parameters, trains, ("freeze_include", config.freeze_include),
                            ("freeze_exclude", config.freeze_exclude))
        if adapted and not any(trains):
            problems.append(f"freeze_include {config.freeze_include!r} leaves nothing trainable: narrow it, or name "
                            f"what trains in freeze_exclude.")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{type(config).__name__} does not fit the net, which is unchanged:\n  "
                         + listed(problems))
    of_deltas = {id(item) for delta in [*deltas_in(cells).values(), *adapted.values()]
                 for item in delta.delta_parameters().values()}
    # What freeze_exclude names belongs to the adapter too.
    more = [item for (item, _), value in zip(parameters, trains) if value and id(item) not in of_deltas]
    parts = {id(delta.delta_parameters()[name]) for delta in adapted.values() for name in delta.split_axes}
    same_on_all_ranks([parameter for (parameter, _), value in zip(parameters, trains)
                       if value and id(parameter) not in parts])
    apply_trains(net, parameters, trains)
    record, untied = put_in(net, cells, adapted, followers, [*saved, *more], ties, shared)
    record.replication = record.replication or config.replication
    record.told, record.note = {**record.told, **config.told()}, note or record.note
    for parameter in untied.values():
        parameter.requires_grad = True
    if config.inference_mode:
        for parameter in [*untied.values(), *(item for item, _ in parameters)]:
            parameter.requires_grad = False


def with_default_targets(config: DeltaConfig, cells: Mapping[str, nn.Cell]) -> tuple[DeltaConfig, str]:
    """Return a config with the targets that PEFT has for the net's family, where it names none, and a sentence on it.

    Args:
        config: with or without `target_modules`.
        cells: of the net, by path.
    """
    if config.target_modules is not None or config.all_by_default or config.has_other_targets:
        return config, ""
    family = family_of(without_inner(cells))
    fields: dict[str, Any] = {} if family is None else dict(config.default_fields(family))
    if family is None or not fields:
        return config, ""
    named = " and ".join(f"{name} {', '.join(value)}" for name, value in fields.items())
    return (dataclasses.replace(config, **fields),
            f"{named}: PEFT's default for {family.name}, for the config names none")


def _targets(cells: Mapping[str, nn.Cell], config: DeltaConfig) -> tuple[dict[str, nn.Cell], list[str]]:
    """Return the layers that a config adapts, by path, and every problem found."""
    chosen, problems = targets(cells, config)
    try:
        more = config.more_targets(cells)
    except ValueError as error:
        return chosen, [*problems, str(error)]
    problems += [f"{path}: it is adapted twice by this config." for path in more if path in chosen]
    return chosen | more, problems
