"""Configs from mappings and YAML files."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore

from mindpet_lite.arguments import did_you_mean, some_of
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import FLOAT_TYPES
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.spelling import SPELLINGS
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.directory import CONFIG_FILE
from mindpet_lite.formats.strict_json import parse_object
from mindpet_lite.pet_block import pet_block
from mindpet_lite.yaml_files import read_yaml

# Fields of PEFT's files that say where they come from; how a weight lies is known from its layer.
_OF_FILES = ("peft_type", "inference_mode", "auto_mapping", "revision", "peft_version", "fan_in_fan_out", FIELD)
# Fields whose default, which means "not used", is a value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"qalora_group_size": (16,), "megatron_core": ("megatron.core",)}
# Fields of PEFT's corda_config that say how its program works, not what it gives.
_OF_COMPUTING = ("prune_temporary_fields", "verbose", "use_float16_for_covariance")
_TYPE_FIELDS = ("param_init_type", "compute_dtype")
_TYPE_NAMES = {str(item).split(".")[-1].lower(): item for item in FLOAT_TYPES}


def as_config(config: DeltaConfig | Mapping[str, Any] | str | os.PathLike[str]) -> DeltaConfig:
    """Return a config from a config, a mapping with `pet_type`, or the path of a YAML file.

    A mapping or a YAML file may also be a whole configuration that holds one `pet_config` block, at its top or below
    `model` and `model_config` as MindFormers writes it:

    ```yaml
    pet_config:
      pet_type: lora
      lora_rank: 8
      lora_alpha: 16
      lora_dropout: 0.1
      target_modules: '.*wq|.*wk|.*wv|.*wo'
    ```

    MindFormers' and PEFT's keys are known: `exclude_layers` is `exclude_modules`, and a type that is null is the
    default. PEFT's ``adapter_config.json`` is read too, and its directory: the settings of an adapter to be trained
    anew, so that its `inference_mode`, which is true in every file, does not count.

    Raises:
        TypeError: `config` is none of these, or a field has the wrong type.
        ValueError: an unknown key or method, or a field's value is out of range.
        FileNotFoundError: there is no such file.
    """
    if isinstance(config, DeltaConfig):
        return config
    if isinstance(config, Mapping):
        return _from_document(config)
    if isinstance(config, (str, os.PathLike)):
        json_file = _json_file(Path(config))
        if json_file is not None:
            return _from_json(json_file)
        document = read_yaml(config)
        try:
            if "pet_type" not in document and pet_block(document) is None:
                raise ValueError(f"expected a 'pet_config' block, but the file has the keys "
                                 f"{some_of(document)}.{did_you_mean('pet_config', document)}")
            return _from_document(document)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{config}: {error}") from error
    raise TypeError(f"config must be a config such as LoraConfig, a mapping with 'pet_type' or the path of a YAML "
                    f"file, but got {type(config).__name__}.")


def _json_file(path: Path) -> Path | None:
    """Return PEFT's file that a path means, or None."""
    if (path / CONFIG_FILE).is_file():
        return path / CONFIG_FILE
    return path if path.suffix == ".json" else None


def _from_json(path: Path) -> DeltaConfig:
    """Build the config that PEFT's adapter_config.json describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no config of a method that is known, or says what is not supported.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: give PEFT's adapter_config.json, its directory, or a YAML file.")
    try:
        return from_mapping(_peft_fields(parse_object(path.read_bytes())))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _peft_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that PEFT's config gives a method of ours, without those that say nothing.

    Raises:
        ValueError: it is of an unknown method, or a field asks for what is not supported.
    """
    kinds = {"LORA": "lora", **{kind.peft.peft_type: name for name, kind in METHODS.items() if kind.peft}}
    name = document.get("peft_type")
    if name not in kinds:
        raise ValueError(f"peft_type must be one of {', '.join(kinds)}, but got {name!r:.100}."
                         f"{did_you_mean(str(name), kinds)}")
    kind = METHODS[kinds[name]]
    known = {field.name for field in dataclasses.fields(kind)}
    neutral = kind.peft.neutral if kind.peft else {}
    # What PEFT writes of every adapter of the method says nothing of this one.
    said_of_all = kind.peft.written if kind.peft else {}
    found: dict[str, Any] = {"pet_type": kinds[name]}
    for field, value in document.items():
        if (field in known or SPELLINGS.get(field) in known) and field != "inference_mode":
            if field.endswith("_config") and isinstance(value, Mapping):
                value = {name: item for name, item in value.items() if item is not None and name not in _OF_COMPUTING}
            if value not in (None, {}, []):
                found[field] = value
        elif field not in (*_OF_FILES, *said_of_all) and value not in (None, False, "", [], {}, *neutral.get(field, ()),
                                                      *_NEUTRAL.get(field, ())):
            raise ValueError(f"{field} = {value!r:.100} is not supported.")
    return found


def _from_document(document: Mapping[str, Any]) -> DeltaConfig:
    """Build the config of a block with `pet_type`, or of a document around one `pet_config` block."""
    block = None if "pet_type" in document else pet_block(document)
    return from_mapping(document if block is None else block)


def from_mapping(block: Mapping[str, Any]) -> DeltaConfig:
    """Build the config that a mapping with `pet_type` and that method's fields describes."""
    values = dict(block)
    name = values.pop("pet_type", None)
    if not isinstance(name, str) or name.lower() not in METHODS:
        raise ValueError(f"pet_type must be one of {', '.join(METHODS)}, but got {name!r:.100}."
                         f"{did_you_mean(name, METHODS)}")
    kind = METHODS[name.lower()]
    known = [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")]
    fields: dict[str, Any] = {}
    for key, value in values.items():
        field = key if key in known else SPELLINGS.get(key, key)
        if field not in known:
            raise ValueError(f"Unknown key {key!r:.100} in pet_config of type {name!r}; it has {', '.join(known)}."
                             f"{did_you_mean(key, known)}")
        if field in fields:
            raise ValueError(f"Key {key!r} in pet_config says {field!r:.100} a second time; keep one of the two.")
        # MindFormers' null is its default, an empty list of exclusions excludes nothing.
        if value is None and field in _TYPE_FIELDS or key == "exclude_layers" and value == []:
            continue
        fields[field] = _type_of(field, value) if field in _TYPE_FIELDS else value
    return kind(**fields)


def _type_of(field: str, value: Any) -> mindspore.dtype:
    """Return the MindSpore type that a YAML string such as float16 names; leave anything else to the config."""
    if not isinstance(value, str):
        return value
    if value.lower() not in _TYPE_NAMES:
        raise TypeError(f"{field} must be one of {', '.join(_TYPE_NAMES)}, but got {value!r:.100}."
                        f"{did_you_mean(value, _TYPE_NAMES)}")
    return _TYPE_NAMES[value.lower()]
