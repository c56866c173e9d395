"""Adapters of the samples of one batch, and room in which adapters come and go by values."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mindspore import nn

from mindpet_lite.delta import METHODS
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.adapters import Adapter
from mindpet_lite.graph.match import targets
from mindpet_lite.graph.named import check_names, keep, make_banks, named, plain_cells, set_weights
from mindpet_lite.graph.tree import replace


@contextlib.contextmanager
def adapters_for_samples(net: nn.Cell, names: Sequence[str | None]) -> Iterator[nn.Cell]:
    """Inside the block each sample of a batch has an adapter of its own; afterwards all is as before.

    Compiles for a new number of samples; not where `reserve_adapters` was given that number.

    Args:
        net: a net with adapters, whose adapted layers get inputs whose first axis counts the samples.
        names: for each sample a name, or None for the base.

    Raises:
        ValueError: a name is none of the net's; or its adapters do not add up. Nothing is changed. In the block: a
            layer's input has another number of samples.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> net = mp.add_adapter(net, "style", mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> with mp.adapters_for_samples(net, ["default", "style", None]):
        ...     y = net(x)
        >>> y.shape
        (3, 2)
    """
    known = named(net)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"names must be a list with a name, or None, for each sample, but got {names!r:.60}.")
    check_names([name for name in names if name is not None], known)
    if known.turns:
        raise ValueError("The adapters of this net do not add up (DoRA, and methods other than LoRA), so samples of "
                         "one batch cannot have different ones: call the net once for each adapter.")
    banks, swaps = make_banks(net, known)
    keep(net, known)
    before = {path: bank.samples for path, bank in banks.items()}
    _count_samples(net, banks, {path: len(names) for path in banks}, swaps)
    for bank in banks.values():
        bank.set_samples(names)
    try:
        yield net
    finally:
        _count_samples(net, banks, before, {})
        for bank in banks.values():
            bank.set_weights(known.active)


def _count_samples(net: nn.Cell, banks: Mapping[str, Any], counts: Mapping[str, int],
                   swaps: dict[nn.Cell, nn.Cell]) -> None:
    """Let the banks of a net have a row of `scaling` for each sample; new ones take their places."""
    changed = [path for path, bank in banks.items() if bank.samples != counts[path]]
    for path in changed:
        banks[path].reserve(banks[path].room, counts[path])
    if changed or swaps:
        replace(net, swaps)


def reserve_adapters(net: nn.Cell, rank: int, samples: int = 0, target_modules: Any = None) -> nn.Cell:
    """Keep room for adapters of LoRA, so that they are loaded, replaced and deleted in the running graph, by values.

    The base is frozen. All nets of the process compile again at their next call, and then not any more for what fits
    the room.

    Args:
        net: a net with or without adapters.
        rank: how many ranks the adapters in a layer's room may have together; positive.
        samples: how many samples a batch has, 0 or more, where they are to have different adapters without a compile.
            Default: 0.
        target_modules: layers that get room besides those that are adapted, as a config spells them. Default: None.

    Returns:
        `net`.

    Raises:
        ValueError: a number is none; the layers do not exist or cannot be adapted; the room would be smaller than what
            stands in it. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> _ = mp.save_adapter(net, "style")
        >>> net = mp.reserve_adapters(net, rank=8)
        >>> net = mp.load_adapter(net, "style", name="style")       # by values: nothing compiles again
        >>> mp.set_adapter(net, "style")
        >>> mp.active_adapters(net)
        {'style': 1.0}
    """
    for field, value, least in (("rank", rank, 1), ("samples", samples, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{field} must be an int of at least {least}, but got {value!r:.60}.")
    known = named(net)
    method = known.method or next(name for name, kind in METHODS.items() if kind.holds_several)
    chosen: dict[str, nn.Cell] = {}
    if target_modules is not None:
        chosen, problems = targets(plain_cells(net), METHODS[method](target_modules=target_modules))
        if problems:
            raise ValueError(f"The net is unchanged:\n  {listed(problems)}")
    banks, swaps = make_banks(net, known, chosen, method)
    if not banks:
        raise ValueError("The net has no adapted layer: name in target_modules which layers are to have room.")
    problems = [f"{path}: {reason}" for path, bank in banks.items() if (reason := bank.room_problem(rank))]
    if problems:
        raise ValueError(f"A room of rank {rank} does not fit. The net is unchanged:\n  {listed(problems)}")
    if not known.names:
        # As after get_pet_model: the base is frozen.
        for parameter in net.get_parameters():
            parameter.requires_grad = False
    for bank in banks.values():
        bank.reserve(rank, samples)
        bank.adapter = bank.adapter or Adapter()
    known.method = method
    keep(net, known)
    replace(net, swaps)
    set_weights(net, known)
    return net
