"""The two files of an adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from mindpet_lite.formats.strict_json import parse_object

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# A pattern for each of 100,000 layers takes less.
_MAX_CONFIG = 20_000_000


def read_config(handle: BinaryIO, path: Path) -> dict[str, Any]:
    """Return the config in an open file.

    Raises:
        ValueError: it is no JSON object, or too large to be one.
    """
    if os.fstat(handle.fileno()).st_size > _MAX_CONFIG:
        raise ValueError(f"{path} is larger than {_MAX_CONFIG} bytes, which no config is.")
    try:
        return parse_object(handle.read())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
