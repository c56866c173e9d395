"""JSON of strangers: what Python's reader lets pass in silence is refused here."""
from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

# No number that an adapter's files hold has more digits; Python takes quadratic time for longer ones.
_DIGITS = 20


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Raises:
        ValueError: `data` is no JSON in UTF-8, is nested beyond Python's limit, or holds something else than an object;
            an object in it has a key twice; a number is NaN, infinite (``1e400`` is), or has more than 20 digits.
            The message goes on from "<file> ".
    """
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("is not valid JSON for us: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"must hold a JSON object, but holds a {type(found).__name__}.")
    return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r:.100} stands twice in one object")
    for key, value in pairs:
        if not _finite(value):
            raise ValueError(f"{key} must be made of finite numbers, but is {value!r}")
    return found


def _finite(value: Any) -> bool:
    """Return whether no number in `value` is NaN or infinite; objects within were looked at when they were made."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, list) or all(map(_finite, value))


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"the number {digits[:_DIGITS]}... has {len(digits)} digits")
    return int(digits)
