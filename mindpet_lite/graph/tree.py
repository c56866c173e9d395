"""Find and replace cells in a net. The only file of the package that touches MindSpore's private attributes."""
from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import mindspore
from mindspore import Parameter, nn, ops
from mindspore.train.callback import LambdaCallback, _CallbackManager

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.dropout import Dropout, KeepsMasks

# What a cell carries besides its structure, and a cell put in its place must carry on.
_CARRIED = ("_forward_pre_hook", "_forward_hook", "_backward_pre_hook", "_backward_hook", "_cell_backward_hook",
            "_cell_backward_pre_hook", "_forward_pre_hook_with_kwargs", "_forward_hook_with_kwargs",
            "_forward_hook_always_called", "_scope", "_param_prefix", "_jit_config_dict")


# How often `replace` was called.
_CHANGES = [0]


def require_cell(net: object) -> nn.Cell:
    """Return `net` if it is a Cell; raise TypeError otherwise."""
    if not isinstance(net, nn.Cell):
        # mindnlp is not imported: its models, and transformers' by way of it, are modules of mindtorch.
        if any(kind.__module__.split(".")[0] == "mindtorch" for kind in type(net).__mro__):
            raise TypeError(f"net must be a mindspore.nn.Cell, but {type(net).__name__} is a model of mindnlp, whose "
                            f"layers are mindtorch modules and no Cells: tune it with mindnlp.peft, or build "
                            f"the model with mindone or MindFormers; the adapter's files are the same.")
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


def without_inner(cells: Mapping[str, nn.Cell]) -> dict[str, nn.Cell]:
    """Return the cells of a net without those below an adapted one."""
    inner = {id(part) for cell in cells.values() if isinstance(cell, Delta)
             for part in cells_by_path(cell).values() if part is not cell}
    return {path: cell for path, cell in cells.items() if id(cell) not in inner}


def paths_of_parameters(net: nn.Cell) -> list[tuple[Parameter, list[str]]]:
    """Return every Parameter of `net` once, with all its dotted paths, in the order of the net."""
    return [(parameter, [path for path, _ in owners]) for parameter, owners in owners_of_parameters(net)]


def owners_of_parameters(net: nn.Cell) -> list[tuple[Parameter, list[tuple[str, nn.Cell]]]]:
    """Return every Parameter of `net` once, with each of its dotted paths and the cell that holds it there."""
    owners: dict[int, tuple[Parameter, list[tuple[str, nn.Cell]]]] = {}
    listed: dict[int, tuple[Parameter, list[tuple[str, nn.Cell]]]] = {}
    for path, cell in cells_by_path(net).items():
        for name, parameter in cell.parameters_and_names(expand=False):
            # A ParameterTuple puts Parameters of other cells on a list, by their full names: no path leads there.
            found = listed if "." in name else owners
            found.setdefault(id(parameter), (parameter, []))[1].append((f"{path}.{name}" if path else name, cell))
    return list({**listed, **owners}.values())


def set_parameter(cell: nn.Cell, name: str, parameter: Parameter) -> None:
    """Put another Parameter in the place of the one that `cell` holds under `name`, without renaming it."""
    cell._params[name] = parameter
    # Some cells keep their Parameters as plain attributes beside.
    if name in vars(cell):
        object.__setattr__(cell, name, parameter)


def set_cells(net: nn.Cell, parent: nn.CellList, cells: Sequence[nn.Cell]) -> None:
    """Let a CellList of `net` hold these cells; no Parameter is renamed, and compiled graphs are dropped."""
    parent._cells.clear()
    parent._cells.update({str(index): cell for index, cell in enumerate(cells)})
    drop_compiled_graphs(net)


def structure_changes() -> int:
    """Return how often `replace` changed a net; while the number stays, what was found in a net is still there."""
    return _CHANGES[0]


def replace(net: nn.Cell, swaps: Mapping[nn.Cell, nn.Cell]) -> None:
    """Put ``swaps[old]`` wherever `old` stands below `net`; drop the compiled graphs that still run the old cells.

    Parameter names stay as they are: nothing is assigned through `Cell.__setattr__`, which renames.
    """
    _CHANGES[0] += 1
    new_of = {id(old): new for old, new in swaps.items()}
    for parent in set(cells_by_path(net).values()):
        for name, child in parent._cells.items():
            if id(child) in new_of:
                parent._cells[name] = new_of[id(child)]
        # SequentialCell runs a list it keeps beside its children, and users keep such lists too.
        for name, value in list(vars(parent).items()):
            swapped = _swapped(value, new_of)
            if swapped is not value:
                object.__setattr__(parent, name, swapped)
    for old, new in swaps.items():
        _carry_on(old, new)
    refresh_recomputation(net)
    drop_compiled_graphs(net)


def _swapped(value: Any, new_of: Mapping[int, nn.Cell]) -> Any:
    """Return `value` with the cells in it replaced, through lists, tuples and dictionaries; itself if there is none."""
    if isinstance(value, nn.Cell):
        return new_of.get(id(value), value)
    if type(value) in (list, tuple):
        items = [_swapped(item, new_of) for item in value]
        return type(value)(items) if any(new is not old for new, old in zip(items, value)) else value
    if type(value) is dict:
        mapped = {key: _swapped(item, new_of) for key, item in value.items()}
        return mapped if any(mapped[key] is not item for key, item in value.items()) else value
    return value


def _carry_on(old: nn.Cell, new: nn.Cell) -> None:
    for name in _CARRIED:
        # MindSpore 2.10 makes the hook tables when they are first needed, under a name of their own.
        for spelling in (name, f"_lazy{name}"):
            if vars(old).get(spelling):
                object.__setattr__(new, spelling, vars(old)[spelling])
    if old._has_config_recompute and not new._has_config_recompute:
        if old._recompute_cell is not None:
            new.recompute()
        else:
            new._recompute(False, True)
    elif new._has_config_recompute and not old._has_config_recompute:
        # It was recomputed when it last stood here.
        keep_activations(new)


def is_recomputed(cell: nn.Cell) -> bool:
    """Tell whether `cell` itself was set to be recomputed; the cells below it are not asked."""
    return cell._recompute_cell is not None


def keep_activations(cell: nn.Cell) -> None:
    """Take back that `cell` is recomputed, which MindSpore has no call for."""
    object.__setattr__(cell, "_recompute_cell", None)
    _exchange_dropouts(cell, Dropout, ops.Dropout)
    for part in set(cells_by_path(cell).values()):
        object.__setattr__(part, "_has_config_recompute", False)
        # A graph tells by the names of its operators which of them it computes again.
        object.__setattr__(part, "_scope", (part._scope or "").removeprefix("recompute_") or None)
        part.get_flags().pop("output_recompute", None)
        vars(part).pop("output_recompute", None)


def writing_operators(cell: nn.Cell) -> list[str]:
    """Return the attribute names of the operators of `cell` itself that write into Parameters."""
    return [name for name, operator in cell._primitives.items() if getattr(operator, "side_effect_mem", False)]


def recompute(cell: nn.Cell) -> None:
    """Set `cell` to be recomputed, with the dropout masks of its first run."""
    cell.recompute()
    refresh_recomputation(cell)


def refresh_recomputation(net: nn.Cell) -> None:
    """Tell the cells set to recompute what trains now, and let the dropouts in them keep their masks.

    In PyNative mode they list what trains when `recompute()` is called, and give every other Parameter a gradient of
    zero.
    """
    for cell in set(cells_by_path(net).values()):
        again = cell._recompute_cell
        if isinstance(again, nn.Cell):
            object.__setattr__(again, "internal_params", cell.trainable_params())
            if not isinstance(again.wrap_cell.function, KeepsMasks):
                again.wrap_cell.function = KeepsMasks(again.wrap_cell.function, again.args)
            _exchange_dropouts(cell, ops.Dropout, Dropout)


def _exchange_dropouts(cell: nn.Cell, old: type[ops.Primitive], new: type[ops.Primitive]) -> None:
    """Put an operator of class `new` in the place of each dropout of class `old` in `cell`."""
    for part in set(cells_by_path(cell).values()):
        for name, operator in list(part._primitives.items()):
            if type(operator) is old and operator.keep_prob < 1:
                other = new(**operator.init_attrs)
                strategy = getattr(operator, "in_strategy", None)
                setattr(part, name, other.shard(strategy) if strategy else other)


def drop_compiled_graphs(net: nn.Cell) -> None:
    """Make every net compile anew at its next call: a compiled graph does not see that a cell was replaced.

    All nets, because a loss cell, a training step or a gradient function around the changed net holds a graph of it
    too and cannot be found from the inside.
    """
    mindspore.ms_memory_recycle()
    # MindSpore's own list of nets lacks those that copy.deepcopy made.
    for cell in cells_by_path(net).values():
        cell.compile_cache.clear()


def call_at_train_end(action: Callable[[], object]) -> None:
    """Have the `Model.train` or `Model.fit` that calls this call `action` at its end, before its callbacks' turn.

    MindSpore tells a cell when a training begins, by `set_train`, but not when it ends; only the callbacks hear of
    that, and they are found where `Model` runs. Where none runs nothing happens.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        for value in frame.f_locals.values():
            if isinstance(value, _CallbackManager):
                if all(getattr(item, "action", None) != action for item in value._callbacks):
                    ending = LambdaCallback(on_train_end=lambda run_context: action())
                    ending.action = action
                    value._callbacks.insert(0, ending)
                return
        frame = frame.f_back
