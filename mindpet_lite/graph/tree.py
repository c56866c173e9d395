"""Find and replace cells in a net. The only file of the package that touches MindSpore's private attributes."""
from __future__ import annotations

from collections.abc import Mapping

import mindspore
from mindspore import Parameter, nn

# What a cell carries besides its structure, and a cell put in its place must carry on.
_CARRIED = ("_forward_pre_hook", "_forward_hook", "_backward_pre_hook", "_backward_hook", "_cell_backward_hook",
            "_scope", "_param_prefix")


def require_cell(net: object) -> nn.Cell:
    """Return `net` if it is a Cell; raise TypeError otherwise."""
    if not isinstance(net, nn.Cell):
        raise TypeError(f"net must be a mindspore.nn.Cell, but got {type(net).__name__}.")
    return net


def cells_by_path(net: nn.Cell) -> dict[str, nn.Cell]:
    """Return every cell below `net` by its dotted path, `net` itself under ``""``.

    A cell that is shared stands under each of its paths (`Cell.cells_and_names` lists it once).
    """
    found: dict[str, nn.Cell] = {}
    pending: list[tuple[str, nn.Cell]] = [("", require_cell(net))]
    while pending:
        path, cell = pending.pop()
        found[path] = cell
        children = [(f"{path}.{name}" if path else name, child)
                    for name, child in cell._cells.items() if child is not None]
        pending.extend(reversed(children))
    return found


def paths_of_parameters(net: nn.Cell) -> list[tuple[Parameter, list[str]]]:
    """Return every Parameter of `net` once, with all its dotted paths, in the order of the net."""
    paths: dict[int, tuple[Parameter, list[str]]] = {}
    for path, cell in cells_by_path(net).items():
        for name, parameter in cell.parameters_and_names(expand=False):
            entry = paths.setdefault(id(parameter), (parameter, []))
            entry[1].append(f"{path}.{name}" if path else name)
    return list(paths.values())


def replace(net: nn.Cell, swaps: Mapping[nn.Cell, nn.Cell]) -> None:
    """Put ``swaps[old]`` wherever `old` stands below `net`; drop the compiled graphs that still run the old cells.

    Parameter names stay as they are: nothing is assigned through `Cell.__setattr__`, which renames.
    """
    new_of = {id(old): new for old, new in swaps.items()}
    for parent in set(cells_by_path(net).values()):
        for name, child in parent._cells.items():
            if id(child) in new_of:
                parent._cells[name] = new_of[id(child)]
        # SequentialCell runs a list it keeps beside its children, and users keep such lists too.
        for name, value in list(vars(parent).items()):
            if isinstance(value, (list, tuple)) and any(id(item) in new_of for item in value):
                object.__setattr__(parent, name, type(value)(new_of.get(id(item), item) for item in value))
    for old, new in swaps.items():
        _carry_on(old, new)
    drop_compiled_graphs()


def _carry_on(old: nn.Cell, new: nn.Cell) -> None:
    for name in _CARRIED:
        if name in vars(old):
            object.__setattr__(new, name, vars(old)[name])
    if old._has_config_recompute and not new._has_config_recompute:
        if old._recompute_cell is not None:
            new.recompute()
        else:
            new._recompute(False, True)


def drop_compiled_graphs() -> None:
    """Make every net compile anew at its next call: a compiled graph does not see that a cell was replaced.

    All nets, because a loss cell, a training step or a gradient function around the changed net holds a graph of it
    too and cannot be found from the inside.
    """
    mindspore.ms_memory_recycle()
