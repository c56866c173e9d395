"""Regular expressions of users and of files: matched as PEFT matches them, once they are known to take bounded time."""
from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

# As many expressions are read in one place: to compile more takes seconds.
MOST = 10_000
# In a path of this length, an expression may be matched in as many ways before it is refused: that leaves room for
# four ``.*``, which take a few seconds at worst.
_LENGTH, _WAYS = 100, 2e8
# What any choice counts at least, so that many small ones do not add up to a long time either.
_CHOICE = 10


def compile_checked(pattern: str, path: str = "") -> re.Pattern[str]:
    """Return a compiled expression, a user's or a file's, once it is known to take bounded time.

    Python's matcher tries every way in which the repeats and alternatives of an expression can fit; ``(a+)+`` has so
    many that it never ends. So the ways are counted first.

    Args:
        pattern: the expression.
        path: what it is to be matched with; the usual paths of layers without it.

    Raises:
        ValueError: `pattern` is no regular expression, or could take too long. The message goes on from "<place> ".
    """
    return _compiled("{}", pattern, _rounded(path))


def compile_end(pattern: str, path: str = "") -> re.Pattern[str]:
    """Return, as `compile_checked`, the expression that matches whole paths which end as `pattern` says, as in PEFT."""
    return _compiled(r"(.*\.)?({})", pattern, _rounded(path))


def _rounded(path: str) -> int:
    return max(_LENGTH, math.ceil(len(path) / _LENGTH) * _LENGTH)


# Each layer of an adapter asks for the same ones, up to `MOST` for a config's field.
@functools.lru_cache(maxsize=1 << 15)
def _compiled(frame: str, pattern: str, length: int) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"is no regular expression but a {type(pattern).__name__}.")
    try:
        compiled, tree = re.compile(frame.format(pattern)), parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}.") from error
    if _ways(tree, length) > _WAYS:
        raise ValueError("is a regular expression that could take too long: it repeats what is repeated, or has too "
                         "many repeats and alternatives. Write .* for what may stand between the names.")
    return compiled


def _ways(tree: Any, length: int) -> float:
    """Return an upper bound of the ways in which a parsed expression can fit a text of a length."""
    total = 1.0
    for kind, argument in tree:
        name = str(kind)
        if name == "BRANCH":
            total *= max(sum(_ways(branch, length) for branch in argument[1]), _CHOICE)
        elif name.endswith("_REPEAT"):
            least, most, inner = argument
            times = min(most, length)
            # Python's floats end at 1e308.
            total *= min(_ways(inner, length), 1e3) ** times * (max(times - least + 1, _CHOICE) if most > least else 1)
        else:
            total *= max([1.0, *(_ways(part, length) for part in _parts(argument))])
        total = min(total, 1e300)
    return total


def _parts(argument: Any) -> list[Any]:
    """Return the expressions within the argument of a group or of a look around."""
    items = argument if isinstance(argument, tuple) else (argument,)
    return [part for part in items if isinstance(part, parser.SubPattern)]


def by_own_name(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths whose last part an expression matches from its start, as MindFormers matches layers.

    So ``wq`` means ``layers.0.wq`` and also ``layers.0.wq2``. Nothing is meant unless some last part matches whole.
    """
    try:
        expression = compile_checked(pattern)
    except ValueError:
        return []
    names = {path: path.rpartition(".")[2] for path in paths if path}
    if not any(expression.fullmatch(name) for name in set(names.values())):
        return []
    return [path for path, name in names.items() if (found := expression.match(name)) and found.end()]
