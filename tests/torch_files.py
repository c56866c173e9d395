"""Files as torch.save writes them, put together by hand: no test of reading them needs PyTorch."""
from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

TYPES = {"float32": b"FloatStorage", "int64": b"LongStorage"}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor(key: str, kind: bytes, size: int, shape: Iterable[int], strides: Iterable[int], offset: int = 0) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + numbers([size])[1:-1]
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + numbers([offset])[1:-1] + numbers(shape)
            + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR")


def state_dict(items: dict[str, bytes]) -> bytes:
    return (b"\x80\x02ccollections\nOrderedDict\n)R(" + b"".join(text(name) + value for name, value in items.items())
            + b"u}" + text("_metadata") + b"Nsb.")


def old_file(path: Path, pickled: bytes, storages: dict[str, np.ndarray]) -> Path:
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    rows = [struct.pack("<q", row.size) + row.tobytes() for row in storages.values()]
    path.write_bytes(b"".join([*head, pickled, pickle.dumps(list(storages), 2), *rows]))
    return path


def zip_file(path: Path, pickled: bytes, storages: dict[str, np.ndarray]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, row in storages.items():
            archive.writestr(f"archive/data/{key}", row.tobytes())
    return path


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Write tensors in the older format; those of two axes lie in columns, as PyTorch's may."""
    items, storages = {}, {}
    for number, (name, value) in enumerate(tensors.items()):
        order = value.T if value.ndim == 2 else value
        strides = [step // value.itemsize for step in order.copy("C").strides]
        storages[str(number)] = np.ascontiguousarray(order).reshape(-1)
        items[name] = tensor(str(number), TYPES[str(value.dtype)], value.size, value.shape,
                             strides[::-1] if value.ndim == 2 else strides)
    return old_file(path, state_dict(items), storages)


def calls(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function with a text."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + text(argument) + b"tR."
