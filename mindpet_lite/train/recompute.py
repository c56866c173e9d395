"""Compute activations again in the backward pass instead of keeping them: less memory, about one more forward."""
from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence

from mindspore import mint, nn

from mindpet_lite.arguments import warn_user
from mindpet_lite.delta.source import tree_of
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.match import named_by
from mindpet_lite.graph.statistics import statistics_are_frozen
from mindpet_lite.graph.tree import (
    cells_by_path,
    drop_compiled_graphs,
    is_recomputed,
    keep_activations,
    recompute,
    require_cell,
    without_inner,
    writing_operators,
)

# Functions of mindspore.ops that write into a Parameter.
_WRITERS = ("assign", "assign_add", "assign_sub")
# How the names of MindSpore's functions begin that draw.
_RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal", "standard_normal", "uniform", "gamma", "poisson",
           "gumbel", "alpha_dropout", "feature_alpha_dropout")
# Cells that draw by other operators than nn.Dropout's.
_OTHER_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, mint.nn.Dropout)


def net_recompute(net: nn.Cell, pattern: str | Sequence[str]) -> list[str]:
    r"""Set every cell that `pattern` names to be recomputed: its activations are not kept for the backward pass.

    Of each such cell only its inputs are kept; what lies between is computed again when its gradients are due (Chen et
    al., 2016, arXiv:1604.06174). Name the repeated blocks of a net: ``r"blocks\.\d+"``. It may be called before or
    after `get_pet_model` and the net's first call, in graph mode and PyNative; `undo_recompute` takes it back.

    Gradients stay those of the forward pass. What `nn.Dropout` gave, in the deltas and in the base, is kept and not
    drawn again: in a graph its output and its mask, in PyNative its mask. Other random operators (`ops.dropout`,
    `nn.Dropout2d`, `mint.nn.Dropout`) may draw anew, as those of the base may under MindSpore's own `Cell.recompute()`:
    a warning names cells of these.

    Args:
        net: any Cell; it is changed in place.
        pattern: a regular expression that must match a cell's whole path, or a list of names (each equal to a path or
            to its last parts).

    Returns:
        The paths of the cells, in the order of the net.

    Raises:
        TypeError: `net` is no Cell, or `pattern` neither text nor a list of texts.
        ValueError: `pattern` is empty or hits nothing, it hits cells inside one another, a cell that is recomputed
            already, that is never called itself (a `CellList`), or that writes Parameters when it runs (a BatchNorm),
            which recomputing would write twice. All problems stand in one message, and the net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> mp.net_recompute(net, ["0", "2"])
        ['0', '2']
    """
    cells = without_inner(cells_by_path(require_cell(net)))
    problems: list[str] = []
    chosen: dict[int, str] = {}
    # The first cell that is run with others inside is what most nets call a block.
    example = next((path for path, cell in cells.items() if path and _is_called(cell) and any(cell.cells())),
                   "blocks.0")
    for path in named_by("pattern", pattern, cells, example, problems):
        chosen.setdefault(id(cells[path]), path)
    for path in chosen.values():
        reason = _refusal(path, cells[path], chosen, cells)
        if reason:
            problems.append(f"{path or 'the net itself'}: {reason}")
    if problems:
        raise ValueError("pattern does not fit the net, which is unchanged:\n  " + listed(problems))
    for path in chosen.values():
        recompute(cells[path])
    drop_compiled_graphs(net)
    _warn_of_other_dropouts({f"{path}.{name}" if name else path: part for path in chosen.values()
                             for name, part in cells_by_path(cells[path]).items()})
    return list(chosen.values())


def undo_recompute(net: nn.Cell) -> list[str]:
    """Let every cell of `net` keep its activations again, whoever set it to be recomputed.

    Args:
        net: a net with cells that are recomputed.

    Returns:
        The paths of the cells that were recomputed.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: none is recomputed.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> _ = mp.net_recompute(net, ["0"])
        >>> mp.undo_recompute(net)
        ['0']
    """
    cells = cells_by_path(require_cell(net))
    found = {id(cell): path for path, cell in reversed(cells.items()) if is_recomputed(cell)}
    if not found:
        raise ValueError("No cell of the net is recomputed: there is nothing to undo.")
    for path in found.values():
        keep_activations(cells[path])
    drop_compiled_graphs(net)
    return list(found.values())[::-1]


def _refusal(path: str, cell: nn.Cell, chosen: Mapping[int, str], cells: Mapping[str, nn.Cell]) -> str | None:
    """Return why `cell` cannot be recomputed beside the other chosen ones, or None if it can."""
    below = cells_by_path(cell)
    inner = next((chosen[id(part)] for part in below.values() if part is not cell and id(part) in chosen), None)
    if inner is not None:
        return (f"{inner} lies inside it, and is computed again with it anyway: name one of the two ('[^.]*' in a "
                f"regular expression stands for one part of a path).")
    done = next((name for name, part in below.items() if is_recomputed(part)), None)
    around = next((name for name, part in cells.items() if part is not cell and is_recomputed(part)
                   and any(each is cell for each in cells_by_path(part).values())), None)
    if around is not None:
        return f"it lies inside {around or 'the net'}, which is recomputed already: call undo_recompute(net) first."
    if done is not None:
        return f"{f'{done} inside it' if done else 'it'} is recomputed already: call undo_recompute(net) first."
    if not _is_called(cell):
        return f"a {type(cell).__name__} is never called itself: name the cells in it, such as {path}.0."
    writer = next((name for name, part in below.items() if _writes(part)), None)
    if writer is not None:
        return (f"{f'{writer} inside it' if writer else 'it'} ({type(below[writer]).__name__}) writes Parameters when "
                f"it runs, and would do so twice.")
    return None


def _warn_of_other_dropouts(cells: Mapping[str, nn.Cell]) -> None:
    found = [f"{path} ({type(cell).__name__})" for path, cell in cells.items() if isinstance(cell, _OTHER_DROPOUTS)]
    found += [f"{path} ({name})" for path, cell in cells.items() if not type(cell).__module__.startswith("mindspore.")
              for name in _drawing_functions(cell)]
    if found:
        warn_user(f"{', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''} may draw another "
                  f"mask when it is computed again, and the gradients are then not those of the forward pass: use "
                  f"nn.Dropout there, whose mask is kept.")


def _drawing_functions(cell: nn.Cell) -> list[str]:
    """Return the functions of MindSpore that draw random numbers in the `construct` of a cell."""
    known = getattr(type(cell).construct, "__globals__", {})
    found = []
    for node in ast.walk(tree_of(cell)):
        if isinstance(node, ast.Call):
            parts = ast.unparse(node.func).split(".")
            function = functools.reduce(lambda item, name: getattr(item, name, None), parts[1:], known.get(parts[0]))
            if callable(function) and parts[-1].lower().startswith(_RANDOM) \
                    and str(getattr(function, "__module__", "")).startswith("mindspore"):
                found.append(".".join(parts))
    return found


def _is_called(cell: nn.Cell) -> bool:
    return type(cell).construct is not nn.Cell.construct and not isinstance(cell, (nn.CellList, nn.CellDict))


def _writes(cell: nn.Cell) -> bool:
    """Tell whether `cell` itself writes Parameters when it runs, by its operators and by what its `construct` says."""
    if statistics_are_frozen(cell):
        return False
    if writing_operators(cell):
        return True
    own = {name for name, _ in cell.parameters_and_names(expand=False)}
    for node in ast.walk(tree_of(cell)):
        targets = [node.target] if isinstance(node, ast.AugAssign) else \
            node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(item, ast.Attribute) and item.attr in own for item in targets):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _WRITERS:
                return True
    return False
