"""What the config.json of a model of Hugging Face says, wherever in it: models are made of models."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def objects_of(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield an object of a config and all objects within it, the outer ones first."""
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from objects_of(item)


def model_types(config: Mapping[str, Any]) -> set[str]:
    """Return the names of models that a config holds: each model_type, and the classes in architectures."""
    types = {item["model_type"] for item in objects_of(config) if isinstance(item.get("model_type"), str)}
    return types | set(architectures(config))


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a config is for."""
    found = config.get("architectures")
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def vocabularies(config: Mapping[str, Any]) -> set[int]:
    """Return the sizes of all vocabularies of tokens; BERT has one of token types too."""
    return {size for item in objects_of(config) for name, size in item.items()
            if str(name).endswith("vocab_size") and not str(name).startswith("type_") and type(size) is int}


def ties(config: Mapping[str, Any]) -> set[bool]:
    """Return what a config and those within it that have a vocabulary say of tie_word_embeddings."""
    found = [config, *(item for item in objects_of(config) if item is not config and "vocab_size" in item)]
    return {item["tie_word_embeddings"] for item in found if isinstance(item.get("tie_word_embeddings"), bool)}


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Tell whether a config, or one within it, has settings of a quantisation."""
    return any(item.get("quantization_config") for item in objects_of(config))


def scale_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a weight's block with one number of its scale, where a config says them."""
    for item in objects_of(config):
        size = item.get("weight_block_size") or item.get("block_structure")
        if isinstance(size, list) and len(size) == 2 and all(type(length) is int and length > 0 for length in size):
            return size[0], size[1]
    return None
