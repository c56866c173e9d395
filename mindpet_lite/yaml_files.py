"""YAML files; the only file that reads them."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mindpet_lite.arguments import did_you_mean


def read_freeze(path: str | os.PathLike[str]) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """Return the `include` and `exclude` lists of the `freeze` block of a YAML file; None for one left out."""
    document = read_yaml(path)
    block = document.get("freeze")
    if not isinstance(block, Mapping) or not block:
        raise ValueError(f"{path}: expected a 'freeze' block with 'include', 'exclude' or both, but got {block!r}; "
                         f"the file has the keys {', '.join(map(str, document)) or '(none)'}."
                         f"{did_you_mean('freeze', map(str, document))}")
    for key in block:
        if key not in ("include", "exclude"):
            raise ValueError(f"{path}: unknown key {key!r} in 'freeze'; it has include and exclude."
                             f"{did_you_mean(key, ('include', 'exclude'))}")
    return block.get("include"), block.get("exclude")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, no text, or its top is no mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no YAML file at {path}: check the path.")
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected keys and values at the top, but got a {type(document).__name__}.")
    return document
