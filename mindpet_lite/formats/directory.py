"""An adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``, PEFT's where PEFT has the method."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from mindpet_lite.formats import native, peft
from mindpet_lite.formats.atomic import open_together, write_together
from mindpet_lite.formats.files import tensors_in, to_bytes
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.formats.strict_json import parse_object

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# A pattern for each of 100,000 layers takes less.
_MAX_CONFIG = 20_000_000


def save(state: AdapterState, directory: Path) -> None:
    """Write both files of the adapter, whole or not at all."""
    tensors, config = (peft if state.method in peft.METHODS else native).encode(state)
    write_together(directory, {CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
                               TENSOR_FILE: to_bytes(tensors)})


def load(directory: Path) -> AdapterState:
    """Read an adapter directory; every error names the file.

    Raises:
        OSError: the directory or one of its two files is missing (FileNotFoundError) or cannot be read.
        ValueError: a file is damaged, or does not hold a sound adapter.
    """
    try:
        with open_together(directory, (CONFIG_FILE, TENSOR_FILE)) as files:
            config = read_config(files[CONFIG_FILE], directory / CONFIG_FILE)
            with tensors_in(files[TENSOR_FILE], directory / TENSOR_FILE) as file:
                tensors = {name: file.read(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {error.filename}: an adapter is a directory with {CONFIG_FILE} and "
                                f"{TENSOR_FILE}, as save_adapter() writes it.{_hint(directory)}") from error
    try:
        return (native if config.get("format") == native.FORMAT else peft).decode(tensors, config)
    except ValueError as error:
        raise ValueError(f"The adapter in {directory} cannot be used:\n  {error}") from error


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


def _hint(directory: Path) -> str:
    """Return what to do where PEFT wrote its tensors as a pickle."""
    return " Its adapter_model.bin is a pickle, which can run code when it is read and is never read: save it with " \
           "safe_serialization=True." if (directory / "adapter_model.bin").exists() else ""
