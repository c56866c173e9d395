"""Safetensors files: read as from a stranger, one tensor at a time; written as the safetensors library writes them."""
from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mindpet_lite.formats.float8 import F8_E4M3, F8_E5M2, F8_E8M0, FLOAT8, float8_values
from mindpet_lite.formats.other_files import what_it_is
from mindpet_lite.formats.strict_json import parse_object

# bfloat16, which numpy lacks: a type of its own that holds the bits, so that a file can be written again as it was.
BF16 = np.dtype([("bf16", "<u2")])
# By safetensors' name, in the order in which its library lays tensors out.
_TYPES: dict[str, np.dtype] = {
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"), "C64": np.dtype("<c8"),
    "F32": np.dtype("<f4"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "BF16": BF16, "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "F8_E8M0": F8_E8M0, "F8_E4M3": F8_E4M3,
    "F8_E5M2": F8_E5M2, "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?")}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
# A tensor takes about 100 bytes of a header, and reading a header takes up to 25 times its size in memory. (The
# safetensors library reads headers up to 100 MB.)
_MAX_HEADER = 30_000_000
_MAX_NAME, _MAX_AXES = 1000, 32


class Entry(NamedTuple):
    """Where a tensor lies in a file: its bytes are those of `parts`, (begin, end) each, one after the other."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]


class TensorFile:
    """An open file of tensors, whose every number has been checked; tensors are read when they are asked for.

    Args:
        handle: the open file; closed with this object.
        path: its name in messages.
        entries: where each tensor lies.
        metadata: the texts that the file holds beside them.
    """

    def __init__(self, handle: BinaryIO, path: Path, entries: Mapping[str, Entry], metadata: dict[str, str]) -> None:
        self.path, self.metadata = path, metadata
        self._handle, self._entries = handle, entries

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._handle.close()

    def keys(self) -> list[str]:
        """Return the names of the tensors, in the order of the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the type of a tensor as numpy has it; `BF16` for bfloat16, one of `FLOAT8` for 8 bit floats."""
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, in memory of its own.

        Raises:
            OSError: the file cannot be read.
            ValueError: the tensor takes more memory than there is, holds truth values other than 0 and 1, or the file
                was cut short since it was opened.
        """
        entry = self._entries[name]
        try:
            value = np.empty(entry.shape, entry.dtype)
        except MemoryError as error:
            size = math.prod(entry.shape) * entry.dtype.itemsize
            raise ValueError(f"{self.path}: {name} takes {size / 1e9:.1f} GB, more memory than there is.") from error
        raw = value.reshape(-1).view(np.uint8)
        place = raw.data
        for begin, end in entry.parts:
            self._handle.seek(begin)
            if self._handle.readinto(place[:end - begin]) != end - begin:  # type: ignore[attr-defined]
                raise ValueError(f"{self.path} was cut short while it was read.")
            place = place[end - begin:]
        if entry.dtype == np.bool_ and raw.size and raw.max() > 1:
            raise ValueError(f"{self.path}: {name} holds truth values other than 0 and 1: the file is damaged.")
        return value


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file; nothing but its header is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or no safetensors file, or a tensor has a name or type that we do not read.
    """
    handle = open_regular(path)
    try:
        return tensors_in(handle, path)
    except BaseException:
        handle.close()
        raise


def tensors_in(handle: BinaryIO, path: Path) -> TensorFile:
    """Return the tensors of an open safetensors file; `path` is its name in messages. Errors as `open_tensors`."""
    size = os.fstat(handle.fileno()).st_size
    start = handle.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
        raise ValueError(f"{path} is not a whole safetensors file: {what_it_is(start + handle.read(100))}")
    header = handle.read(length)
    try:
        if not header.startswith(b"{"):
            raise ValueError("is not valid JSON: it must begin with '{'.")
        found = parse_object(header)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole safetensors file: its header {error}") from error
    try:
        metadata = _metadata(found.pop("__metadata__", {}))
        entries = {name: _entry(name, raw, 8 + length) for name, raw in found.items()}
        _check_cover(entries, 8 + length, size)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return TensorFile(handle, path, entries, metadata)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a safetensors file; bfloat16 in the type `BF16`. Errors as `open_tensors` and `read`."""
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.keys()}


def as_float(value: np.ndarray) -> np.ndarray:
    """Return bfloat16 and 8 bit floats as float32, the same numbers; other arrays as they are.

    An 8 bit weight is these numbers times a scale, which its file holds in a tensor of its own.
    """
    if value.dtype in FLOAT8:
        return float8_values(value.dtype)[value.view("u1")]
    if value.dtype != BF16:
        return value
    # bfloat16 is the upper half of a float32.
    return np.asarray(np.left_shift(value["bf16"].astype(np.uint32), np.uint32(16))).view(np.float32)


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 values as bfloat16, without rounding."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32) >> np.uint32(16)
    return bits.astype(np.uint16).view(BF16).reshape(value.shape)


def type_name(dtype: np.dtype) -> str:
    """Return the name of a type in messages, as safetensors has it."""
    return _NAMES.get(dtype, str(dtype))


def to_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a safetensors file.

    Args:
        tensors: arrays by name; `BF16` is written as bfloat16.
        metadata: texts to write beside them; default ``{"format": "pt"}``, as PEFT writes.

    Raises:
        ValueError: a name or type that our reader refuses.
    """
    header, order = to_header({name: (value.dtype, value.shape) for name, value in tensors.items()}, metadata)
    return b"".join([header, *(tensors[name].astype(tensors[name].dtype.newbyteorder("<"), copy=False).tobytes()
                               for name in order)])


def to_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
              metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[str]]:
    """Return what stands before the data in a safetensors file, and the names in the order in which their data follow.

    The widest types come first, as in the files of the safetensors library, whose bytes these are.

    Args:
        tensors: type and shape by name.
        metadata: as `to_bytes`.

    Raises:
        ValueError: as `to_bytes`.
    """
    types = {}
    for name, (dtype, _) in tensors.items():
        check_name(name)
        types[name] = _NAMES.get(dtype.newbyteorder("<"), "")
        if not types[name]:
            raise ValueError(f"{name} is of type {dtype}, which a safetensors file cannot hold.")
    rank = {kind: place for place, kind in enumerate(_TYPES)}
    order = sorted(tensors, key=lambda name: (rank[types[name]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    end = 0
    for name in order:
        begin, end = end, end + math.prod(tensors[name][1]) * tensors[name][0].itemsize
        header[name] = {"dtype": types[name], "shape": list(tensors[name][1]), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; a pipe or device, which might never end, is refused.

    Raises:
        OSError: the file cannot be read or is no regular file.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a directory, but a file is needed.")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is no regular file.")
    return path.open("rb")


def check_name(name: str) -> None:
    """Refuse names of tensors that are no path of a layer.

    Raises:
        ValueError: the name is empty, longer than 1000 characters, not printable, or climbs through folders.
    """
    if not name or len(name) > _MAX_NAME:
        raise ValueError(f"the name {name[:40]!r} of a tensor has {len(name)} characters; 1 to {_MAX_NAME} are read.")
    if not name.isprintable():
        raise ValueError(f"the name {name!r} of a tensor holds characters that cannot be printed.")
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"the name {name!r} of a tensor is a path of folders, not of a layer.")


def check_shape(name: str, shape: Any, itemsize: int) -> int:
    """Return how many bytes a tensor takes.

    Raises:
        ValueError: `shape` is no list of lengths, or numpy could not hold it.
    """
    if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"the shape of {name} must be a list of lengths, but is {shape!r:.100}.")
    # A length of 0 leaves the product 0, but numpy multiplies the others all the same.
    if len(shape) > _MAX_AXES or math.prod(length or 1 for length in shape) * itemsize >= 2 ** 62:
        raise ValueError(f"the shape {shape!r:.100} of {name} is beyond what an array can have.")
    return math.prod(shape) * itemsize


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"__metadata__ must hold texts by name, but is {found!r:.100}.")
    return found


def _entry(name: str, raw: Any, start: int) -> Entry:
    """Return the checked entry of a header; `start` is where the data begin in the file."""
    check_name(name)
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets, but has {raw!r:.100}.")
    kind, offsets = raw["dtype"], raw["data_offsets"]
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"{name} is of type {kind!r:.40}, which cannot be read; save it as F32, F16 or BF16.")
    size = check_shape(name, raw["shape"], _TYPES[kind].itemsize)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets) \
            or not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"the data_offsets of {name} must be a begin and an end, but are {offsets!r:.100}.")
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"{name} of shape {raw['shape']} and type {kind} takes {size} bytes, but its data_offsets "
                         f"{offsets} span {offsets[1] - offsets[0]}.")
    return Entry(_TYPES[kind], tuple(raw["shape"]), ((start + offsets[0], start + offsets[1]),))


def _check_cover(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Refuse tensors that overlap, leave bytes between them, or do not end where the file ends."""
    last, reached = "the header", start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].parts):
        begin, end = entry.parts[0]
        if begin != reached:
            raise ValueError(f"{last} and {name} overlap." if begin < reached else
                             f"{begin - reached} bytes between {last} and {name} belong to no tensor.")
        last, reached = name, end
    if reached > size:
        raise ValueError(f"{last} runs {reached - size} bytes past the end of the file: it was cut short or damaged; "
                         f"copy or save it again.")
    if reached < size:
        raise ValueError(f"{size - reached} bytes after {last} belong to no tensor.")
