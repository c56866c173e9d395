"""The flags that a YAML file's `params` and `freeze` blocks stand for."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.pet_block import KEY, pet_block
from mindpet_lite.tasks.options import FREEZE_FLAG, RESERVED
from mindpet_lite.yaml_files import read_freeze, read_yaml


def flags_of(path: Path, blocks: tuple[str, ...]) -> list[str]:
    """Return the command-line arguments for the script that a YAML file describes.

    Each entry of `params` becomes `--key value`, a list `--key first second ...`; no shell reads them, so spaces and
    quotes stay as they are. A `freeze` or `pet_config` block becomes `--advanced_config <path>`: the script hands that
    path to `freeze_from_config` or `get_pet_model`. In MindFormers' own configuration, whose `pet_config` stands below
    `model`, other keys are the script's.

    Args:
        path: the YAML file; it is only read.
        blocks: the blocks that it may hold besides `pet_config`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, holds other or no blocks, or a value that no flag can carry.
    """
    document = read_yaml(path)
    try:
        block = pet_block(document)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    of_mindformers = block is not None and KEY not in document
    for key in document:
        if key not in blocks and (key == "freeze" or key != KEY and not of_mindformers):
            raise ValueError(f"{path}: expected only {' and '.join(map(repr, blocks))} at the top, but got "
                             f"{key!r:.100}.{did_you_mean(key, blocks)}")
    if not document:
        raise ValueError(f"{path} is empty; expected {' or '.join(map(repr, blocks))}.")
    flags: list[str] = []
    if "params" in document:
        params = document["params"]
        if not isinstance(params, Mapping) or not params:
            raise ValueError(f"{path}: params must hold keys and values, but got {params!r:.100}.")
        for key, value in params.items():
            flags += [f"--{_key(path, key)}", *_values(path, key, value)]
    if "freeze" in document:
        read_freeze(path)
    if "freeze" in document or block is not None:
        flags += [f"--{FREEZE_FLAG}", str(path)]
    return flags


def _key(path: Path, key: object) -> str:
    """Return a key of `params` that can be the name of a flag."""
    if not isinstance(key, str):
        raise ValueError(f"{path}: YAML reads the key {key!r:.100} in params as {type(key).__name__}; write it in "
                         f"quotes.")
    if not key or key.startswith("-") or "=" in key or len(key.split()) != 1 or "\0" in key:
        raise ValueError(f"{path}: the key {key!r:.100} in params cannot be the name of a flag; write it without "
                         f"dashes in front, spaces and '='.")
    if key in RESERVED:
        raise ValueError(f"{path}: the key {key!r:.100} in params is an option of the task itself; give it there and "
                         f"remove it here.")
    return key


def _values(path: Path, key: str, value: object) -> list[str]:
    """Return the argument that a value becomes, or for a list one for each item."""
    if value is None or value == []:
        raise ValueError(f"{path}: {key!r} in params has no value; give one or remove the key.")
    texts = []
    for item in value if isinstance(value, list) else [value]:
        if item is None or isinstance(item, (Mapping, list, set, tuple, bytes)):
            raise ValueError(f"{path}: {key!r} in params must be a text, a number, true, false or a list of these, but "
                             f"got {value!r:.100}.")
        if str(item).startswith("--") or "\0" in str(item):
            raise ValueError(f"{path}: {key!r} in params has the value {item!r}, which the script would take for "
                             f"another flag.")
        texts.append(str(item))
    return texts
