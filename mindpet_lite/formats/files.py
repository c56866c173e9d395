"""Reading and writing tensor files: writes are atomic, reads check everything first."""
from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
          "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file; bfloat16, which numpy lacks, becomes float32 (the same numbers).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or holds a type that numpy lacks.
    """
    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): it was cut short or damaged; copy or "
                         f"save it again.") from error
    return {name: _array(path, name, **entry) for name, entry in entries}


def _array(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype == "BF16":
        # The upper half of a float32.
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in _TYPES:
        raise ValueError(f"{path}: {name} is of type {dtype}, which cannot be read; save it as F32, F16 or BF16.")
    return np.frombuffer(data, _TYPES[dtype]).reshape(shape)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the path of a file to write; when the block ends well, it takes the place of `path`.

    Raises:
        OSError: the directory cannot be made or written to, or the disk is full; `path` is as before.
    """
    with _explained(path), _replacing(path) as temporary:
        yield temporary


def write_together(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write several files of one directory: all are complete on disk before the first takes its place.

    Raises:
        OSError: as `atomic_file`.
    """
    with _explained(directory), contextlib.ExitStack() as stack:
        for name, data in files.items():
            stack.enter_context(_replacing(directory / name)).write_bytes(data)


def to_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the content of a safetensors file."""
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata={"format": "pt"})


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a path on the same disk as `path`, and move what was written there to `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"there is a directory at {path}")
    # A directory, because some writers leave files of their own beside a file they could not finish.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say in an OSError of the block what could not be written and what to do."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{path} could not be written ({error.strerror or error}): check that the disk has space "
                          f"and that the folder can be written to. What was there is unchanged.") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
