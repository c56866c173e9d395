"""An adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``, PEFT's where PEFT has the method."""
from __future__ import annotations

import json
from pathlib import Path

from mindpet_lite.formats import native, peft
from mindpet_lite.formats.files import read_tensors, to_bytes, write_together
from mindpet_lite.formats.state import AdapterState

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"


def save(state: AdapterState, directory: Path) -> None:
    """Write both files of the adapter, whole or not at all."""
    tensors, config = (peft if state.method in peft.METHODS else native).encode(state)
    write_together(directory, {CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
                               TENSOR_FILE: to_bytes(tensors)})


def load(directory: Path) -> AdapterState:
    """Read an adapter directory; every error names the file.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        ValueError: a file is damaged, or does not hold a sound adapter.
    """
    for path in (directory, directory / CONFIG_FILE, directory / TENSOR_FILE):
        if not path.exists():
            raise FileNotFoundError(f"There is no {path}: an adapter is a directory with {CONFIG_FILE} and "
                                    f"{TENSOR_FILE}, as save_adapter() writes it.")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG_FILE} must hold an object, but holds a {type(config).__name__}.")
    tensors = read_tensors(directory / TENSOR_FILE)
    try:
        return (native if config.get("format") == native.FORMAT else peft).decode(tensors, config)
    except ValueError as error:
        raise ValueError(f"The adapter in {directory} cannot be used:\n  {error}") from error
