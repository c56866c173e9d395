"""Does an optimizer hold what trains, and nothing else of the net?"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspore import nn
from mindspore.experimental import optim

from mindpet_lite.graph.adapters import bring_up_to_date, deltas_in, saved_of
from mindpet_lite.graph.parameters import STATISTICS, net_parameters
from mindpet_lite.graph.tree import cells_by_path, require_cell

_OPTIMIZERS = (nn.Optimizer, optim.Optimizer)


def check_optimizer(net: nn.Cell, optimizer: nn.Cell) -> None:
    """Raise unless `optimizer` holds all that trains of the net's adapters, and nothing frozen of the net.

    Where the base is frozen, all that trains of the net belongs to its adapter, such as what `modules_to_save` or
    `freeze_delta(..., exclude=)` name. An optimizer
    that was made before the net was adapted lacks the adapter: the loss stays constant. One that was made before
    something was frozen trains it all the same in graph mode. Groups of parameters, such as those of
    `mindpet_lite.lora_plus_groups`, are an optimizer like any other. To train a part of an adapter, freeze the
    rest with `mindpet_lite.freeze_modules`.

    `mindpet_lite.HealthCallback` and `mindpet_lite.TrainableParamsCheckPoint` check before the first step
    the optimizers that they find, several as one.

    Args:
        net: any Cell. Where it has no adapter, only what is frozen is looked for.
        optimizer: of `mindspore.nn`, `mindspore.mint.optim` or `mindspore.experimental.optim`.

    Raises:
        TypeError: `net` is no Cell, or `optimizer` no optimizer.
        ValueError: the optimizer lacks something or holds too much; the message names some by their paths.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> mp.check_optimizer(net, nn.Adam(net.trainable_params(), 1e-3))
    """
    if not isinstance(optimizer, _OPTIMIZERS):
        raise TypeError(f"optimizer must be an optimizer such as nn.Adam, but got {type(optimizer).__name__}.")
    _check(require_cell(net), [optimizer])


def check_optimizers_of(net: nn.Cell, params: Any) -> None:
    """Check the optimizers of a `Model.train` as `check_optimizer` does; where it shows none, nothing is checked.

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


def _check(net: nn.Cell, optimizers: Sequence[nn.Cell]) -> None:
    held = {id(item) for optimizer in optimizers for item in optimizer.parameters}
    states = {id(item) for optimizer in optimizers for item in optimizer.get_parameters()} - held
    cells = cells_by_path(net)
    found = deltas_in(cells)
    bring_up_to_date(found)
    parameters = [(item, names) for item, names in net_parameters(net) if id(item) not in states]
    of_adapter = saved_of(found.values()).keys() | {
        id(item) for delta in found.values() for item in delta.delta_parameters().values()}
    if found and not any(isinstance(cell, _OPTIMIZERS) for cell in cells.values()):
        # In a net whose base is frozen, all that trains is saved with the adapter. A training step has more of its own.
        others = [(item, names) for item, names in parameters
                  if id(item) not in of_adapter and not names[0].endswith(STATISTICS)]
        if not all(item.requires_grad for item, _ in others):
            of_adapter |= {id(item) for item, _ in others}
    missing, frozen = [], []
    for parameter, names in parameters:
        if parameter.requires_grad and id(parameter) in of_adapter - held:
            missing.append(names[0])
        elif not parameter.requires_grad and id(parameter) in held:
            frozen.append(names[0])
    settings = [f"{path}.{name}" for path, delta in found.items() for name, item in delta.setting_parameters().items()
                if id(item) in held]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)} of the adapter, which would stay as {_it_is(missing)}: it was made "
                        f"before the net was adapted, or from a part of what trains.")
    if frozen:
        problems.append(f"it holds {_some(frozen)}, which {'is' if len(frozen) == 1 else 'are'} frozen and would train "
                        f"in graph mode all the same: it was made before that was frozen.")
    if settings:
        problems.append(f"it holds {_some(settings)}, which the settings say, such as lora_alpha, and which never "
                        f"train: it was made from net.get_parameters().")
    waiting = [path for path, delta in found.items() if delta.data_start is not None and delta.delta_norm() == 0]
    if waiting:
        problems.append(f"{_some(waiting)} still {'waits' if len(waiting) == 1 else 'wait'} for the data that the "
                        f"start is made from: call initialize_from_data(net, batches) before it is made.")
    if problems:
        raise ValueError("The optimizer does not fit the net:\n  " + "\n  ".join(problems) + "\nMake it from "
                         "net.trainable_params(), after the net is adapted and frozen.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _it_is(names: list[str]) -> str:
    return "it is" if len(names) == 1 else "they are"
