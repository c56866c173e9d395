"""Does an optimizer hold what trains, and nothing else of the net?"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mindspore import nn
from mindspore.experimental import optim

from mindpet_lite.graph.adapters import deltas_in, saved_of
from mindpet_lite.graph.parameters import net_parameters
from mindpet_lite.graph.tree import cells_by_path, require_cell

_OPTIMIZERS = (nn.Optimizer, optim.Optimizer)


def check_optimizer(net: nn.Cell, optimizer: nn.Cell) -> None:
    """Raise unless `optimizer` holds every trainable Parameter of the net's adapters, and no frozen one of the net.

    An optimizer that was made before the net was adapted lacks the adapter: the loss stays constant. One that was made
    before something was frozen trains it all the same in graph mode. Groups of parameters, such as those of
    :func:`mindpet_lite.lora_plus_groups`, are an optimizer like any other. To train a part of an adapter, freeze the
    rest with :func:`mindpet_lite.freeze_modules`.

    :class:`mindpet_lite.HealthCallback` and :class:`mindpet_lite.TrainableParamsCheckPoint` check before the first step
    the optimizers that they find, several as one.

    Args:
        net: any Cell. Where it has no adapter, only what is frozen is looked for.
        optimizer: of `mindspore.nn`, `mindspore.mint.optim` or `mindspore.experimental.optim`.

    Raises:
        TypeError: `net` is no Cell, or `optimizer` no optimizer.
        ValueError: the optimizer lacks something or holds too much; the message names some by their paths.
    """
    if not isinstance(optimizer, _OPTIMIZERS):
        raise TypeError(f"optimizer must be an optimizer such as nn.Adam, but got {type(optimizer).__name__}.")
    _check(require_cell(net), [optimizer])


def check_optimizers_of(net: nn.Cell, params: Any) -> None:
    """Check the optimizers of a `Model.train` as :func:`check_optimizer` does; where it shows none, nothing is checked.

    Args:
        net: whose Parameters train.
        params: what a callback's `run_context.original_args()` gives.
    """
    inside = [cell for root in (params.train_network, params.network) if isinstance(root, nn.Cell)
              for cell in cells_by_path(root).values() if isinstance(cell, _OPTIMIZERS)]
    given = getattr(params, "optimizer", None)
    found = [*inside, *([given] if isinstance(given, _OPTIMIZERS) else [])]
    if found:
        _check(net, found)


def _check(net: nn.Cell, optimizers: Iterable[nn.Cell]) -> None:
    held = {id(item) for optimizer in optimizers for item in optimizer.parameters}
    found = deltas_in(cells_by_path(net)).values()
    of_adapter = saved_of(found).keys() | {id(item) for delta in found for item in delta.delta_parameters().values()}
    missing, frozen = [], []
    for parameter, names in net_parameters(net):
        if parameter.requires_grad and id(parameter) in of_adapter - held:
            missing.append(names[0])
        elif not parameter.requires_grad and id(parameter) in held:
            frozen.append(names[0])
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)} of the adapter, which would stay as {_it_is(missing)}: it was made "
                        f"before the net was adapted, or from a part of what trains.")
    if frozen:
        problems.append(f"it holds {_some(frozen)}, which {'is' if len(frozen) == 1 else 'are'} frozen and would train "
                        f"in graph mode all the same: it was made before that was frozen.")
    if problems:
        raise ValueError("The optimizer does not fit the net:\n  " + "\n  ".join(problems) + "\nMake it from "
                         "net.trainable_params(), after the net is adapted and frozen.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _it_is(names: list[str]) -> str:
    return "it is" if len(names) == 1 else "they are"
