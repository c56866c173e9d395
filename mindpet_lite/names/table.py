"""The user's own names of layers: a table of them, checked and applied."""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from mindpet_lite.names.components import COMPONENTS
from mindpet_lite.names.expressions import compile_checked

# Of a name, as in files.
_LONGEST = 1000
Table = Mapping[str, str] | Sequence[tuple[str, str]]


def check_table(table: Table | None) -> None:
    """Refuse what is no table of names.

    Raises:
        ValueError: it holds something else than names, or an expression or replacement that cannot be used.
    """
    pairs = list(table.items()) if isinstance(table, Mapping) else [] if table is None else table
    if isinstance(table, Mapping):
        nothing = [key for key, name in pairs if name is None or name == ""]
        if nothing:
            raise ValueError(f"a name map gives {nothing[0]!r} the name {table[nothing[0]]!r}, which is none: give a "
                             f"layer's path. To leave out all of a component's layers, name the one to take with "
                             f"component (--component).")
    if not isinstance(pairs, (list, tuple)) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
            for pair in pairs):
        raise ValueError(f"a name map is names by names, or pairs of a regular expression and what to put in its "
                         f"place, but got {table!r:.100}.")
    for pattern, replacement in () if isinstance(table, Mapping) else pairs:
        try:
            compile_checked(pattern).sub(replacement, "")
        except ValueError as error:
            raise ValueError(f"{pattern!r:.100} of the name map {error}") from error
        except (re.error, IndexError) as error:
            raise ValueError(f"{pattern!r:.100} to {replacement!r:.100} of the name map cannot be used: {error}."
                             ) from error


def renamed(paths: Iterable[str], table: Table | None) -> tuple[dict[str, str], list[str]]:
    """Return the new names of the paths that the user's table renames, and what is wrong with the table.

    Args:
        paths: of an adapter's layers.
        table: as `check_table` takes it; None renames nothing.
    """
    paths = list(dict.fromkeys(paths))
    if isinstance(table, Mapping):
        known = set(paths)
        mapped = {path: table[path] for path in paths if path in table}
        return mapped, _no_paths(mapped) + [
            f"the name map renames {key}, but the adapter has no such layer.{near(key, paths)}"
            for key, name in table.items() if key not in known and not (name in known and _spells_out(key, name))]
    found, hits = {}, set()
    for path in paths:
        changed, used = path, False
        for number, (pattern, replacement) in enumerate(table or ()):
            changed, count = re.subn(pattern, replacement, changed)
            if len(changed) > _LONGEST:
                raise ValueError(f"{pattern!r:.100} of the name map makes of {path:.100} a name of {len(changed)} "
                                 f"characters; names of layers have up to {_LONGEST}.")
            hits |= {number} if count else set()
            used |= count > 0
        if used:
            found[path] = changed
    problems = [f"the name map leaves nothing of {path}." for path, name in found.items() if not name]
    return found, problems + _no_paths({path: name for path, name in found.items() if name}) + [
        f"{pattern!r} of the name map is found in no layer of the adapter, such as {paths[0] if paths else '(none)'}."
        for number, (pattern, _) in enumerate(table or ()) if number not in hits]


def _no_paths(names: Mapping[str, str]) -> list[str]:
    """Return a sentence for each new name that is no path: a part of it is empty."""
    return [f"the name map gives {path} the name {name!r:.100}, which is no path: a part between its dots is empty."
            for path, name in names.items() if not all(name.split("."))]


def near(path: str, others: Iterable[str]) -> str:
    """Return a hint at the paths closest to another one, empty if there are none."""
    close = difflib.get_close_matches(path, [other for other in others if other != path], n=3)
    return f" Close to it: {', '.join(close)}." if close else ""


def _spells_out(key: str, path: str) -> bool:
    """Tell whether a key is what kohya's files call a path: it has told the path then, and renames nothing more."""
    name, below = (text.replace(".", "_") for text in (key, path))
    return name == below or name.startswith("lora_") and name.endswith(f"_{below}") or \
        below in [f"{component}_{name}" for component in COMPONENTS]
