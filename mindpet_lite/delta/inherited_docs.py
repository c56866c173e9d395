"""What a class's parents document of its arguments, in its own docstring too: `help(LoraConfig)` says them all."""
from __future__ import annotations

import inspect
import re

_ARGS = re.compile(r"^Args:\n((?:    .*(?:\n|$)|\n)*)", re.MULTILINE)
# An argument, its type in brackets if it is given, and the lines of its description.
_ENTRY = re.compile(r"^    (\*{0,2}\w+)(?: \(.*?\))?:.*(?:\n(?:     .*|(?=\n {5})))*", re.MULTILINE)
_OTHER = re.compile(r"^(?:Inputs|Outputs|Returns|Raises|Examples):$", re.MULTILINE)


def entries_of(doc: str) -> dict[str, str]:
    """Return what the Args of a clean docstring say, by the names of the arguments."""
    found = _ARGS.search(doc)
    return {match[1].lstrip("*"): match[0] for match in _ENTRY.finditer(found[1])} if found else {}


def inherit_args(cls: type) -> None:
    """Add to the docstring of a class the arguments that its parents in this package document and it does not."""
    if not vars(cls).get("__doc__"):
        return
    doc = inspect.cleandoc(vars(cls)["__doc__"])
    entries: dict[str, str] = {}
    for kind in cls.__mro__:
        if kind.__module__.startswith("mindpet_lite.") and vars(kind).get("__doc__"):
            entries = {**entries_of(inspect.cleandoc(vars(kind)["__doc__"])), **entries}
    if not entries:
        return
    own = entries_of(doc)
    text = "Args:\n" + "\n".join([*own.values(), *(entry for name, entry in entries.items() if name not in own)]) + "\n"
    found, other = _ARGS.search(doc), _OTHER.search(doc)
    if found:
        start, end = found.start(), found.end()
    else:
        start = end = other.start() if other else len(doc)
    cls.__doc__ = "\n\n".join(filter(None, (part.strip("\n") for part in (doc[:start], text, doc[end:])))) + "\n"
