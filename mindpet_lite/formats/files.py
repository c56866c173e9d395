"""Reading and writing tensor files: writes are atomic, reads check everything first."""
from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is damaged, or holds a type that numpy lacks.
    """
    try:
        return load_file(path)
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): it was cut short or damaged; copy or "
                         f"save it again.") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file beside `path`; when the block ends well, it takes the place of `path`.

    Raises:
        OSError: the directory cannot be made or written to, or the disk is full; `path` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp makes files that only their owner reads; a result has the permissions any new file would have.
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_together(directory: Path, texts: Mapping[str, bytes], tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write several files of one directory: all are complete on disk before the first takes its place."""
    writers: dict[str, Callable[[Path], object]] = {
        **{name: lambda path, data=data: path.write_bytes(data) for name, data in texts.items()},
        **{name: lambda path, data=data: save_file(_contiguous(data), path, metadata={"format": "pt"})
           for name, data in tensors.items()},
    }
    with contextlib.ExitStack() as stack:
        for name, write in writers.items():
            try:
                write(stack.enter_context(atomic_file(directory / name)))
            except SafetensorError as error:
                raise OSError(f"{directory / name} could not be written: {error}") from error


def _contiguous(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
