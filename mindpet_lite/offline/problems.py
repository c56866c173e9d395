"""Many problems in one message."""
from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 8


def listed(problems: Sequence[str], shown: int = _SHOWN) -> str:
    """Return the first problems, and how many more there are."""
    more = [f"and {len(problems) - shown} more."] if len(problems) > shown else []
    return "\n  ".join([*problems[:shown], *more])


def first_of(error: Exception, shown: int = _SHOWN) -> str:
    """Return the first problems in the message of an error."""
    return listed(str(error).split("\n  "), shown)
