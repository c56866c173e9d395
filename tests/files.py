"""What the tests of file formats share: tensors of every type, and pickles that leave a trace when executed."""
from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.checkpoint_file import to_parts
from mindpet_lite.formats.files import BF16
from mindpet_lite.formats.state import AdapterState

BITS = np.array([0x3f80, 0xc020, 0x7f80, 0x7fc1, 0x0001, 0x4049], np.uint16)
TENSORS = {
    "wide": np.arange(6.0).reshape(2, 3), "f": np.arange(6, dtype=np.float32).reshape(3, 2),
    "h": np.ones(4, np.float16),
    "bf": BITS.view(BF16).reshape(2, 3), "i8": np.arange(-3, 3).astype(np.int8), "truth": np.array([True, False]),
    "a.b": np.arange(4), "i": np.arange(3, dtype=np.int32), "empty": np.zeros((0, 5), np.float32),
    "scalar": np.array(3, np.float32), "名": np.ones((1, 1, 2), np.float32), "u": np.arange(3, dtype=np.uint8),
    "i16": np.arange(3, dtype=np.int16), "u16": np.arange(3, dtype=np.uint16), "u32": np.arange(3, dtype=np.uint32),
    "u64": np.arange(3, dtype=np.uint64), "quote\"d": np.ones(2, np.float32)}


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def checkpoint_bytes(values: Mapping[str, np.ndarray | str]) -> bytes:
    return b"".join(bytes(part) for part in to_parts(values.items()))


def save(state: AdapterState, directory: Path) -> None:
    """Write an adapter directory as `save_adapter` does, without a net."""
    write_files(to_files(state, "peft", directory))


def load(directory: Path) -> AdapterState:
    """Read an adapter directory as `load_adapter` does, without a net."""
    return read_adapter(directory).state


class Dangerous:
    """Makes the folder ``executed`` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Dangerous(), 2))
    return data.getvalue()


_PICKLE = "it is a pickle .*never read; save it as safetensors"
# Files that are neither safetensors nor checkpoints, and what is said of them.
OTHERS = [
    (pickle.dumps(Dangerous(), 2), _PICKLE), (pickle.dumps(Dangerous(), 4), _PICKLE), (_zip(), _PICKLE),
    (pickle.dumps(Dangerous(), 0), "cut short, damaged, or"), (b"<!DOCTYPE html><html>", "is a file of another kind"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS.*git lfs pull")]
