"""YAML files; the only file that reads them."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mindpet_lite.arguments import did_you_mean, some_of

# A settings file has a few kB, and a few hundred values. A long text counts as one for each hundred characters.
_MAX_BYTES, _MAX_VALUES, _LONG = 10_000_000, 100_000, 100


def read_freeze(path: str | os.PathLike[str]) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """Return the `include` and `exclude` lists of the `freeze` block of a YAML file; None for one left out."""
    document = read_yaml(path)
    block = document.get("freeze")
    if not isinstance(block, Mapping) or not block:
        raise ValueError(f"{path}: expected a 'freeze' block with 'include', 'exclude' or both, but got "
                         f"{block!r:.100}; the file has the keys {some_of(document)}."
                         f"{did_you_mean('freeze', map(str, document))}")
    for key in block:
        if key not in ("include", "exclude"):
            raise ValueError(f"{path}: unknown key {key!r:.100} in 'freeze'; it has include and exclude."
                             f"{did_you_mean(key, ('include', 'exclude'))}")
    return block.get("include"), block.get("exclude")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, no text, or its top is no mapping; a key stands twice in a mapping; or it is larger
            than a settings file is, by itself or by what its aliases stand for.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no YAML file at {path}: check the path.")
    if Path(path).stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_BYTES} bytes, which no file of settings is.")
    try:
        document = _document(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is no YAML for us: it is nested too deeply.") from None
    # What a tag such as !!bool meets where the text does not suit it is whatever Python raises.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected keys and values at the top, but got a {type(document).__name__}.")
    return document


def _document(text: str) -> Any:
    """Return what a YAML text holds, having looked at its parts before anything is made of them."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        loader.check(node, {}, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """A loader that stops where a file holds more than settings do, and knows keys that stand twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._parsed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node of the text; raise ValueError where there are too many."""
        self._parsed += 1
        _refuse_many(self._parsed)
        return super().compose_node(parent, index)

    def check(self, node: yaml.Node, sizes: dict[int, int], around: set[int]) -> int:
        """Return how many values a node stands for, its aliases spelt out.

        Args:
            node: of the parsed text; an alias is the very node that it names.
            sizes: of the nodes that were looked at, by id.
            around: the ids of the nodes that hold this one.

        Raises:
            ValueError: a node holds itself, stands for too many values, is a mapping with a key twice, or a number with
                too many digits.
        """
        if id(node) in around:
            raise ValueError(f"the alias in line {node.start_mark.line + 1} holds itself.")
        if id(node) not in sizes:
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                self._refuse_twice(node)
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > _LONG:
                raise ValueError(f"the number in line {node.start_mark.line + 1} has {len(node.value)} digits.")
            own = 1 if parts else 1 + len(node.value) // _LONG
            sizes[id(node)] = own + sum(self.check(part, sizes, around | {id(node)}) for part in parts)
        _refuse_many(sizes[id(node)])
        return sizes[id(node)]

    def _refuse_twice(self, mapping: yaml.MappingNode) -> None:
        lines: dict[Any, int] = {}
        for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            # yes and true are one key, and so are 1 and 0x1.
            is_merge = key.tag == "tag:yaml.org,2002:merge"
            value = (key.value,) if is_merge else self.construct_object(key)
            if value in lines:
                cure = "list what is merged after one, <<: [*a, *b]." if is_merge else "keep one of the two."
                raise ValueError(f"the key {key.value!r:.100} stands twice, in lines {lines[value]} and {line}: {cure}")
            lines[value] = line


def _refuse_many(values: int) -> None:
    if values > _MAX_VALUES:
        raise ValueError(f"it stands for more than {_MAX_VALUES} values, its aliases spelt out, which no file of "
                         f"settings does.")
