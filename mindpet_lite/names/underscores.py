"""Paths whose dots became underscores, as kohya's files name layers, and the way back.

``double_blocks_0_img_attn_qkv`` is ``double_blocks.0.img_attn.qkv`` in FLUX and ``double_blocks.0.img_attn_qkv`` in
HunyuanVideo: the file does not say. With the net's paths the answer is exact. Without them a name is looked up in the
networks of `layouts`; a name that may be two layers is refused, and one that is none of theirs is not guessed at.
"""
from __future__ import annotations

import difflib
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from mindpet_lite.names.layouts import IN_DIFFUSERS, NETWORKS, TEXT_ENCODERS, expanded

_NUMBERS = re.compile(r"\d+")


class Paths:
    """The way from underscored names to paths, by the net's paths where they are known."""

    def __init__(self, paths: Iterable[str] | None) -> None:
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in dict.fromkeys(paths or ()):
            self._by_name[path.replace(".", "_")].append(path)

    def known(self, *names: str) -> str | None:
        """Return the net's path that has one of `names`, None if it has none.

        Raises:
            ValueError: it has several.
        """
        found = [path for name in names for path in self._by_name.get(name, [])]
        if len(found) > 1:
            raise ValueError(f"{names[0]} may be {' or '.join(found)}: the underscores do not say. Rename the file's "
                             f"keys, or use a format that keeps the dots.")
        return found[0] if found else None

    def near(self, name: str) -> str:
        """Return a hint at the net's closest names, empty if there are none."""
        close = difflib.get_close_matches(name, self._by_name, n=3)
        return f" Close names in the net: {', '.join(self._by_name[item][0] for item in close)}." if close else ""


def cut(name: str) -> dict[str, str]:
    """Return the dotted path of `name` by each known network that has such a layer."""
    found = {}
    for network, pattern, path in _by_form().get(_NUMBERS.sub("#", name), []):
        match = pattern.fullmatch(name)
        if match is not None:
            found[network] = path.replace("#", "{}").format(*match.groups())
    return found


def cut_together(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths that each name of one network may be: none where it is no known one's, several where unclear.

    Where a network has layers of all the names, only such networks count: the layers of one file are those of one.
    """
    cuts = {name: cut(name) for name in names}
    common = set.intersection(*map(set, cuts.values())) if cuts else set()
    return {name: sorted({path for network, path in found.items() if not common or network in common})
            for name, found in cuts.items()}


def networks_of(path: str) -> set[str]:
    """Return the known networks that have a layer of this path."""
    return {network for network, found in cut(path.replace(".", "_")).items() if found == path}


def in_own_names(path: str) -> bool:
    """Tell whether a layer has the name of a transformer's own code, which diffusers has under another name."""
    networks = networks_of(path) - TEXT_ENCODERS
    return bool(networks) and not any(network in IN_DIFFUSERS for network in networks)


@functools.cache
def _by_form() -> Mapping[str, list[tuple[str, re.Pattern[str], str]]]:
    """Return the networks' paths by their underscored names with # for all numbers, each with its exact expression."""
    found: dict[str, list[tuple[str, re.Pattern[str], str]]] = defaultdict(list)
    for network, rows in NETWORKS.items():
        for path in dict.fromkeys(path for row in rows for path in expanded(row)):
            name = path.replace(".", "_")
            pattern = re.compile(re.escape(name).replace(r"\#", r"(\d+)"))
            found[_NUMBERS.sub("#", name)].append((network, pattern, path))
    return found
