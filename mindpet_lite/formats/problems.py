"""Many problems in one message, of a length that a person reads."""
from __future__ import annotations

from collections.abc import Sequence

_SHOWN, _LENGTH = 10, 500


def listed(problems: Sequence[str], shown: int = _SHOWN) -> str:
    """Return the first problems, a line each, and how many more there are."""
    lines = [problem if len(problem) <= _LENGTH else f"{problem[:_LENGTH]}..." for problem in problems[:shown]]
    return "\n  ".join([*lines, *([f"and {len(problems) - shown} more."] if len(problems) > shown else [])])


def first_of(error: Exception, shown: int = _SHOWN) -> str:
    """Return the first problems in the message of an error, whose lines they are."""
    return listed(str(error).split("\n  "), shown)
