"""The code of cells: what a `construct` says, and which names it and what it calls have."""
from __future__ import annotations

import ast
import inspect
import textwrap
from types import CodeType

from mindspore import nn

# Code of these packages is known by its names alone.
_LIBRARIES = ("mindspore", "numpy", "math", "builtins")


def tree_of(cell: nn.Cell) -> ast.AST:
    """Return the code of the `construct` of a cell; nothing where it cannot be read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(type(cell).construct)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def names_in(cell: nn.Cell) -> set[str]:
    """Return the names of a cell's parts, and those in the code that it runs, in functions and methods it calls too."""
    found = {type(cell).__name__, *(name for name in vars(cell) if not name.startswith("_")), *cell.name_cells()}
    waiting, seen = [vars(kind)["construct"] for kind in type(cell).__mro__ if "construct" in vars(kind)], set()
    while waiting:
        function = waiting.pop()
        waiting += [function.__wrapped__] if hasattr(function, "__wrapped__") else []
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is None or code in seen or (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            continue
        seen.add(code)
        names = [name for part in (code, *_inner(code)) for name in (*part.co_names, *part.co_varnames)]
        found.update(names)
        waiting += [item for name in names for item in (
            function.__globals__.get(name), getattr(type(cell), name, None), vars(cell).get(name))
                    if inspect.isfunction(item) or inspect.ismethod(item)]
    return found


def _inner(code: CodeType) -> list[CodeType]:
    """Return the code of the functions and comprehensions in some code."""
    own = [part for part in code.co_consts if isinstance(part, CodeType)]
    return [*own, *(part for one in own for part in _inner(one))]
