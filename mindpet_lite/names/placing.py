"""Which layer of a net each layer of a file is: by its path, its end, other libraries' names, or a table."""
from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from mindpet_lite.names.components import COMPONENTS
from mindpet_lite.names.families import FAMILIES

# To look for close names takes long: so many problems get them.
_HINTS = 20

Table = Mapping[str, str] | Sequence[tuple[str, str]]


def map_names(paths_in_file: Iterable[str], paths_in_net: Iterable[str], table: Table | None = None) -> dict[str, str]:
    """Return the net's path of each path in a file, one to one.

    A path that `table` renames is that of the net. For any other path: the same path; else the one path of the net
    that ends as it does, or that it ends with; else the layer that another library calls so (`families`). A cell that
    only holds the layer of its path, as Wukong's do, gives way to that layer.

    Args:
        paths_in_file: of the file's layers.
        paths_in_net: of all layers of the net.
        table: the user's own names, ``{path in file: path in net}``, or pairs of a regular expression and what to put
            in its place, all used one after the other with `re.sub`.

    Raises:
        ValueError: `table` is no table; or a path has no place in the net, or several, or two have the same: all of
            them stand in one message, with the net's closest paths.
    """
    check_table(table)
    wanted = list(dict.fromkeys(paths_in_file))
    net = list(dict.fromkeys(paths_in_net))
    known = set(net)
    own_names: dict[str, str] = {}
    problems: list[str] = []
    for path in wanted:
        own = _by_table(path, table)
        if own is not None and own not in known:
            problems.append(f"{path} is {own} by your table, which the net does not have.{_near(own, net)}")
        if own is not None:
            own_names[path] = own
    found = {path: path for path in wanted if path in known and path not in own_names}
    rest = [path for path in wanted if path not in found and path not in own_names]
    by_end = _by_end(rest, net) if rest else {}
    by_family = _by_family([path for path in rest if len(by_end[path]) != 1], net)
    for path in rest:
        places = by_end[path] if len(by_end[path]) == 1 else by_family.get(path) or by_end[path]
        if len(places) == 1:
            found[path] = places[0]
        elif places:
            problems.append(f"{path} may be {' or '.join(places[:3])}{' or others' if len(places) > 3 else ''}: say "
                            f"which with a name map.")
        else:
            problems.append(f"{path} is no layer of the net.{_near(path, net) if len(problems) < _HINTS else ''}")
    inside = _inside(found.values(), net)
    found = {path: inside.get(place, place) for path, place in found.items()} | own_names
    taken = Counter(found.values())
    problems += [f"{place} is the place of {' and '.join(path for path in wanted if found.get(path) == place)}."
                 for place, count in taken.items() if count > 1]
    if problems:
        raise ValueError("\n  ".join(problems))
    return {path: found[path] for path in wanted}


def check_table(table: Table | None) -> None:
    """Refuse what is no table of names.

    Raises:
        ValueError: it holds something else than names, or an expression or replacement that cannot be used.
    """
    pairs = list(table.items()) if isinstance(table, Mapping) else [] if table is None else table
    if not isinstance(pairs, (list, tuple)) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
            for pair in pairs):
        raise ValueError(f"a name map is names by names, or pairs of a regular expression and what to put in its "
                         f"place, but got {table!r:.100}.")
    for pattern, replacement in () if isinstance(table, Mapping) else pairs:
        try:
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"{pattern!r} to {replacement!r} of the name map cannot be used: {error}.") from error


def _by_table(path: str, table: Table | None) -> str | None:
    """Return what the user's table makes of a path, None where it says nothing about it."""
    if isinstance(table, Mapping):
        return table.get(path)
    changed = path
    for pattern, replacement in table or ():
        changed = re.sub(pattern, replacement, changed)
    return None if changed == path else changed


def _by_end(paths: Iterable[str], net: Collection[str]) -> dict[str, list[str]]:
    """Return for each path those of the net that end with it or, of those that it ends with, the longest."""
    ends: dict[str, list[str]] = defaultdict(list)
    for place in net:
        for end in _ends(place):
            ends[end].append(place)
    known = set(net)
    found = {}
    for path in paths:
        head, _, below = path.partition(".")
        names = [path] + ([below] if head in COMPONENTS and below else [])
        longer = next((ends[name] for name in names if ends[name]), [])
        # A bare number says nothing.
        shorter = next(([end] for end in _ends(path) if end in known and not end.isdecimal()), [])
        found[path] = longer or shorter
    return found


def _ends(path: str) -> Iterable[str]:
    """Return the path without its first part, without its first two, and so on."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts)))


def _by_family(paths: Collection[str], net: Collection[str]) -> dict[str, list[str]]:
    """Return for each path the net's layers of the same meaning, by the spellings that find the most of the paths."""
    found: dict[str, list[str]] = {}
    for spellings in FAMILIES.values():
        there = []
        for spelling in spellings:
            places: dict[str, list[str]] = defaultdict(list)
            for place in net:
                meaning = spelling(place)
                if meaning is not None:
                    places[meaning].append(place)
            there.append(places)
        hits = []
        for spelling in spellings:
            meanings = {path: meaning for path in paths if (meaning := spelling(path)) is not None}
            hits += [{path: places[meaning] for path, meaning in meanings.items() if meaning in places}
                     for places in there]
        most = max(map(len, hits))
        for hit in hits:
            if most and len(hit) == most:
                for path, those in hit.items():
                    found[path] = _innermost([*found.get(path, []), *those])
    return found


def _inside(paths: Collection[str], net: Collection[str]) -> dict[str, str]:
    """Return, of the net's own paths, those that hold the layer they mean, and where: Wukong's cells around one."""
    holders = {place.rpartition(".")[0] for place in net}
    within = _by_family([path for path in paths if path in holders], net)
    return {path: places[0] for path, places in within.items()
            if len(places) == 1 and places[0].startswith(f"{path}.")}


def _innermost(places: Collection[str]) -> list[str]:
    """Return the places without those that hold another of them, as Wukong's cells hold their convolution."""
    return [place for place in dict.fromkeys(places) if not any(other.startswith(f"{place}.") for other in places)]


def _near(path: str, net: Collection[str]) -> str:
    """Return a hint at the net's closest paths, empty if there are none."""
    close = difflib.get_close_matches(path, net, n=3)
    return f" Close to it: {', '.join(close)}." if close else ""
