"""Many problems in one message."""
from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 8


def listed(problems: Sequence[str]) -> str:
    """Return the first problems, and how many more there are."""
    more = [f"and {len(problems) - _SHOWN} more."] if len(problems) > _SHOWN else []
    return "\n  ".join([*problems[:_SHOWN], *more])


def first_of(error: Exception) -> str:
    """Return the first problems in the message of an error."""
    return listed(str(error).split("\n  "))
