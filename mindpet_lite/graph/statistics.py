"""What normalisation layers count while a net trains, and how it is kept still."""
from __future__ import annotations

from types import MethodType
from typing import Any

from mindspore import nn

from mindpet_lite.arguments import warn_user
from mindpet_lite.graph.adapters import deltas_in, saved_of
from mindpet_lite.graph.parameters import STATISTICS
from mindpet_lite.graph.tree import cells_by_path, drop_compiled_graphs, require_cell


def freeze_statistics(net: nn.Cell) -> list[str]:
    """Keep layers such as BatchNorm in evaluation whatever `set_train()` and `Model.train` say: nothing moves in them.

    Statistics move in training though nothing of the base trains. They are in no adapter file, and the base is another
    one afterwards: `adapters_disabled` does not give what it gave. Frozen, these layers normalise with the statistics
    they have, as in evaluation. Their gamma and beta train or not as before. Call it before or after `get_pet_model`
    and the net's first call.

    Meant is every cell that holds a Parameter called moving_mean, moving_variance, running_mean, running_var or
    num_batches_tracked. Left out are layers that belong to the adapter (modules_to_save), and those of which
    `use_batch_statistics` decides.

    Args:
        net: any Cell; it is changed in place.

    Returns:
        The paths of the layers that stay in evaluation, in the order of the net.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no such layer.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> mp.freeze_statistics(net)
        ['1']
        >>> net.set_train()[1].training
        False
    """
    found = _with_statistics(require_cell(net))
    if not found:
        raise ValueError("No layer of the net has statistics that move in training, such as nn.BatchNorm2d outside "
                         "modules_to_save: there is nothing to freeze.")
    for cell in found.values():
        cell.add_flags_recursive = MethodType(_add_flags_in_evaluation, cell)
        cell.set_train(False)
    drop_compiled_graphs(net)
    return list(found)


def statistics_are_frozen(cell: nn.Cell) -> bool:
    """Tell whether `freeze_statistics` keeps `cell` in evaluation."""
    return getattr(vars(cell).get("add_flags_recursive"), "__func__", None) is _add_flags_in_evaluation


def warn_of_statistics(net: nn.Cell) -> None:
    """Warn of the layers whose statistics will move in training."""
    found = [f"{path} ({type(cell).__name__})" for path, cell in _with_statistics(net).items()
             if not statistics_are_frozen(cell)]
    if found:
        warn_user(f"The statistics of {', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''} "
                  f"move in training though the base is frozen: they are in no adapter file, and the base is another "
                  f"one afterwards. Call mindpet_lite.freeze_statistics(net), or name these layers in modules_to_save "
                  f"to train and save them.")


def _with_statistics(net: nn.Cell) -> dict[str, nn.Cell]:
    """Return the layers with statistics by their paths, each once, without those that belong to an adapter."""
    cells = cells_by_path(net)
    of_adapter = saved_of(deltas_in(cells).values())
    found: dict[int, tuple[str, nn.Cell]] = {}
    for path, cell in cells.items():
        own = {id(item) for name, item in cell.parameters_and_names(expand=False) if name in STATISTICS}
        if own and not own & of_adapter.keys() and getattr(cell, "use_batch_statistics", None) is None:
            found.setdefault(id(cell), (path, cell))
    return dict(found.values())


def _add_flags_in_evaluation(cell: nn.Cell, **flags: Any) -> nn.Cell:
    """Set flags as `nn.Cell.add_flags_recursive` does, but for training."""
    return type(cell).add_flags_recursive(cell, **{**flags, **({"training": False} if "training" in flags else {})})
