"""Configs from mappings and YAML files; the only file that reads YAML."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore
import yaml

from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import FLOAT_TYPES, DeltaConfig, did_you_mean

# MindFormers' and PEFT's spellings of our field names.
_ALIASES = {"exclude_layers": "exclude_modules", "r": "lora_rank"}
_TYPE_FIELDS = ("param_init_type", "compute_dtype")
_TYPE_NAMES = {str(item).split(".")[-1].lower(): item for item in FLOAT_TYPES}


def as_config(config: DeltaConfig | Mapping[str, Any] | str | os.PathLike[str]) -> DeltaConfig:
    """Return a config from a config, a mapping with `pet_type`, or the path of a YAML file.

    A YAML file holds a `pet_config` block, at its top or below `model` / `model_config` as MindFormers writes it:

    .. code-block:: yaml

        pet_config:
          pet_type: lora
          lora_rank: 8
          lora_alpha: 16
          lora_dropout: 0.1
          target_modules: '.*wq|.*wk|.*wv|.*wo'

    Raises:
        TypeError: `config` is none of these, or a field has the wrong type.
        ValueError: an unknown key or method, or a field's value is out of range.
        FileNotFoundError: there is no such file.
    """
    if isinstance(config, DeltaConfig):
        return config
    if isinstance(config, (str, os.PathLike)):
        document = read_yaml(config)
        place = _place_of("pet_config", document)
        if place is None:
            raise ValueError(f"{config}: expected a 'pet_config' block, but the file has the keys "
                             f"{', '.join(map(str, document)) or '(none)'}.{did_you_mean('pet_config', document)}")
        try:
            return from_mapping(place["pet_config"])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{config}: {error}") from error
    if isinstance(config, Mapping):
        return from_mapping(config)
    raise TypeError(f"config must be a config such as LoraConfig, a mapping with 'pet_type' or the path of a YAML "
                    f"file, but got {type(config).__name__}.")


def from_mapping(block: object) -> DeltaConfig:
    """Build the config that a mapping with `pet_type` and that method's fields describes."""
    if not isinstance(block, Mapping):
        raise TypeError(f"pet_config must be a mapping with 'pet_type', but got {block!r}.")
    values = dict(block)
    if set(values) == {"pet_config"}:
        return from_mapping(values["pet_config"])
    name = values.pop("pet_type", None)
    if not isinstance(name, str) or name.lower() not in METHODS:
        raise ValueError(f"pet_type must be one of {', '.join(METHODS)}, but got {name!r}."
                         f"{did_you_mean(name, METHODS)}")
    kind = METHODS[name.lower()]
    known = [field.name for field in dataclasses.fields(kind)]
    fields: dict[str, Any] = {}
    for key, value in values.items():
        field = _ALIASES.get(key, key)
        if field not in known:
            raise ValueError(f"Unknown key {key!r} in pet_config of type {name!r}; it has {', '.join(known)}."
                             f"{did_you_mean(key, known)}")
        if field in fields:
            raise ValueError(f"Key {key!r} in pet_config says {field!r} a second time; keep one of the two.")
        fields[field] = _type_of(field, value) if field in _TYPE_FIELDS else value
    return kind(**fields)


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


def _place_of(name: str, document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what holds the block `name`: the document, or MindFormers' `model` or `model_config`; else None."""
    model = document.get("model")
    inner = model.get("model_config") if isinstance(model, Mapping) else None
    for place in (document, model, inner, document.get("model_config")):
        if isinstance(place, Mapping) and name in place:
            return place
    return None


def _type_of(field: str, value: Any) -> mindspore.dtype | None:
    """Return the MindSpore type that a YAML string such as float16 names; leave anything else to the config."""
    if not isinstance(value, str):
        return value
    if value.lower() not in _TYPE_NAMES:
        raise TypeError(f"{field} must be one of {', '.join(_TYPE_NAMES)}, but got {value!r}."
                        f"{did_you_mean(value, _TYPE_NAMES)}")
    return _TYPE_NAMES[value.lower()]
