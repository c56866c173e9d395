"""Checks of arguments, and the errors and warnings that say what is wrong with them."""
from __future__ import annotations

import difflib
import math
import numbers
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

# What adapters' files may say of alpha is bounded, so what a layer can have is, too: what is made can be read again.
MAX_ALPHA = 1e9
# To look for close names takes long.
_MOST_CANDIDATES = 20_000


class UnknownNameError(KeyError, ValueError):
    """A name that is not in a table: the KeyError that MindPet and MindSpore raise, and the ValueError that it is."""

    def __str__(self) -> str:
        # KeyError would show the quoted text.
        return str(self.args[0])


class WrongArgumentError(TypeError, ValueError):
    """An argument of the wrong kind where MindPet documents the other of the two errors than Python's habit is."""


def some_of(names: Iterable[object], shown: int = 10) -> str:
    """Return the first names, and how many more there are."""
    known = [f"{name!s:.100}" for name in names]
    more = f" and {len(known) - shown} more" if len(known) > shown else ""
    return f"{', '.join(known[:shown])}{more}" if known else "(none)"


def did_you_mean(name: object, candidates: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the candidates close to `name` and not equal to it, or an empty string."""
    known = [item for item in dict.fromkeys(map(str, candidates)) if item != name][:_MOST_CANDIDATES]
    folded = {item.lower(): item for item in known}
    near = difflib.get_close_matches(str(name).lower(), list(folded), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(folded[item]) for item in near)}?" if near else ""


def check_int(name: str, value: object, least: int = 1) -> None:
    """Raise TypeError unless `value` is an int (a bool is not), ValueError if it is below `least`."""
    expected = "a positive int" if least == 1 else f"an int of at least {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {expected}, but got {value!r:.100} of type {type(value).__name__}."
                        f"{number_hint(value)}")
    if value < least:
        raise ValueError(f"{name} must be {expected}, but got {value}.")


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but got {value!r:.100} of type {type(value).__name__}.")


def check_number(name: str, value: object) -> float:
    """Raise TypeError unless `value` is a real number (a bool is not); return it as float, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, but got {value!r:.100} of type {type(value).__name__}."
                        f"{number_hint(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a floating-point number.") from None


def check_probability(name: str, value: object) -> None:
    """Raise unless `value` is a number in [0, 1)."""
    number = check_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be in [0, 1), but got {value}.")


def check_positive(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0."""
    number = check_number(name, value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} must be a finite number above 0, but got {value}.")


def is_alpha(value: object) -> bool:
    """Tell whether `value` is a number that can be LoRA's alpha: above 0 and below `MAX_ALPHA`."""
    try:
        return 0 < check_number("alpha", value) < MAX_ALPHA
    except (TypeError, ValueError):
        return False


def check_alpha(name: str, value: object) -> None:
    """Raise unless `value` is a number that can be LoRA's alpha."""
    check_positive(name, value)
    if not is_alpha(value):
        raise ValueError(f"{name} must be below {MAX_ALPHA:g}, but got {value}.")


def number_hint(value: object) -> str:
    """Say why YAML gives a string for a number such as ``1e-5``, where that is what happened."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return ""
        return f" YAML reads {value} as text: write {number!r} or {number:.1e}." if "e" in value.lower() \
            else f" Write {value} without quotes."
    return ""


def warn_user(message: str) -> None:
    """Warn at the line of the caller's own code: the nearest one outside this package and MindSpore's."""
    warnings.warn(message, stacklevel=_user_frame()[0])


def user_lines() -> tuple[tuple[str, int], ...]:
    """Return the file and line of the caller's own code, and of all that called it."""
    frame: FrameType | None = _user_frame()[1]
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def _user_frame() -> tuple[int, FrameType]:
    """Return the frame of the caller's own code, and how far it is from the function that asks."""
    mindspore = getattr(sys.modules.get("mindspore"), "__file__", None) or __file__
    packages = tuple(str(Path(file).parent) + os.sep for file in (__file__, mindspore))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(packages):
        level, frame = level + 1, frame.f_back
    return level, frame
