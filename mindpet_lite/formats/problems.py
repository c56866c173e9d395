"""Many problems in one message, of a length that a person reads."""
from __future__ import annotations

from collections.abc import Sequence

# The end of a line is what to do, so a line is cut in its middle.
_SHOWN, _HEAD, _TAIL = 10, 600, 300


def listed(problems: Sequence[str], shown: int = _SHOWN) -> str:
    """Return the first problems, a line each, and how many more there are."""
    lines = [_cut(problem) for problem in problems[:shown]]
    return "\n  ".join([*lines, *([f"and {len(problems) - shown} more."] if len(problems) > shown else [])])


def _cut(line: str) -> str:
    return line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} ... {line[-_TAIL:]}"


def first_of(error: Exception, shown: int = _SHOWN) -> str:
    """Return the first problems in the message of an error, whose lines they are."""
    return listed(str(error).split("\n  "), shown)
