"""MindSpore's ``.ckpt`` files, read as from a stranger and written, without MindSpore.

A ``.ckpt`` is a protobuf message: ``Checkpoint {1: repeated Value}``, ``Value {1: tag, 2: TensorProto}``, ``TensorProto
{1: repeated dims, 2: tensor_type, 3: tensor_content}``. Large tensors come as several values of one tag, one after the
other, each with the whole shape. Texts have the type ``str`` and hold UTF-32. With ``crc_check`` the file ends with
``crc_num`` and 10 bytes.
"""
from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mindpet_lite.formats.files import BF16, Entry, TensorFile, check_name, check_shape, open_regular
from mindpet_lite.formats.other_files import what_it_is

_TYPES: dict[str, np.dtype] = {
    "Float32": np.dtype("<f4"), "Float16": np.dtype("<f2"), "BFloat16": BF16, "Float64": np.dtype("<f8"),
    "Int8": np.dtype("i1"), "UInt8": np.dtype("u1"), "Int16": np.dtype("<i2"), "UInt16": np.dtype("<u2"),
    "Int32": np.dtype("<i4"), "UInt32": np.dtype("<u4"), "Int64": np.dtype("<i8"), "UInt64": np.dtype("<u8"),
    "Bool": np.dtype("?")}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_TEXT = "str"
# MindSpore writes larger tensors in parts of this many bytes.
_PART = 512 * 1024 * 1024
_CRC, _CRC_BYTES = b"crc_num", 10
_VARINT, _BYTES = 0, 2
_MAX_WORD, _MAX_TEXT, _MAX_AXES = 4000, 64_000_000, 32
Span = tuple[int, int]


def open_checkpoint(path: Path) -> TensorFile:
    """Open a ``.ckpt`` file; nothing but what stands between the data is read. Its texts are the `metadata`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, encrypted or no checkpoint, or a tensor has a name or type that we do not read.
    """
    handle = open_regular(path)
    try:
        start = handle.read(100)
        end = _end(handle, path)
        try:
            entries, texts = _entries(handle, end)
        except ValueError as error:
            raise ValueError(f"{path} is not a whole MindSpore checkpoint ({error}): {what_it_is(start)}") from error
        return TensorFile(handle, path, entries, texts)
    except BaseException:
        handle.close()
        raise


def to_parts(values: Iterable[tuple[str, np.ndarray | str]]) -> Iterator[bytes | memoryview]:
    """Yield the content of a ``.ckpt`` file piece by piece, as `mindspore.save_checkpoint` writes it.

    Args:
        values: arrays and texts by name, each of which is asked for when the one before it is written.

    Raises:
        ValueError: a name or type that our reader refuses.
    """
    for name, value in values:
        check_name(name)
        array = np.array(value) if isinstance(value, str) else value
        kind = _TEXT if isinstance(value, str) else _NAMES.get(array.dtype.newbyteorder("<"))
        if kind is None:
            raise ValueError(f"{name} is of type {array.dtype}, which a MindSpore checkpoint cannot hold.")
        dims = b"".join(_key(1, _VARINT) + _varint(length) for length in ([0] if kind == _TEXT else array.shape))
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        content = array.reshape(-1).view(np.uint8).data
        for begin in range(0, max(len(content), 1), _PART):
            part = content[begin:begin + _PART]
            tensor = dims + _field(2, kind.encode()) + _key(3, _BYTES) + _varint(len(part))
            tag = _field(1, name.encode("utf-8"))
            inner = tag + _key(2, _BYTES) + _varint(len(tensor) + len(part)) + tensor
            yield _key(1, _BYTES) + _varint(len(inner) + len(part)) + inner
            yield part


def _end(handle: BinaryIO, path: Path) -> int:
    """Return where the values end, having compared the checksum where the file has one."""
    size = os.fstat(handle.fileno()).st_size
    handle.seek(max(size - len(_CRC) - _CRC_BYTES, 0))
    tail = handle.read()
    handle.seek(0)
    if not tail.startswith(_CRC):
        return size
    left, found = size - len(tail), 0
    while left:
        block = handle.read(min(left, 1 << 20))
        if not block:
            raise ValueError(f"{path} was cut short while it was read.")
        found, left = zlib.crc32(block, found), left - len(block)
    handle.seek(0)
    if found != int.from_bytes(tail[len(_CRC):], "big"):
        raise ValueError(f"{path} is damaged: its content does not have the checksum at its end; copy it again.")
    return size - len(tail)


def _entries(handle: BinaryIO, end: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return where each tensor lies, and the texts."""
    found: dict[str, tuple[str, list[int], list[Span]]] = {}
    last = None
    for number, item in _fields(handle, (0, end)):
        if number != 1:
            raise ValueError(f"it has an unknown field {number}")
        tag, kind, dims, part = _value(handle, _span(item))
        if tag not in found:
            check_name(tag)
            found[tag] = kind, dims, []
        elif tag != last or (kind, dims) != found[tag][:2]:
            raise ValueError(f"{tag} stands in it twice")
        found[tag][2].append(part)
        last = tag
    texts = {name: _text(handle, name, parts) for name, (kind, _, parts) in found.items() if kind == _TEXT}
    return {name: _entry(name, *item) for name, item in found.items() if name not in texts}, texts


def _entry(name: str, kind: str, dims: list[int], parts: list[Span]) -> Entry:
    if kind not in _TYPES:
        raise ValueError(f"{name} is of type {kind!r}, which cannot be read")
    held = sum(end - begin for begin, end in parts)
    # MindSpore reads the shape [0] with one number in it as a scalar.
    shape = [] if dims == [0] and held == _TYPES[kind].itemsize else dims
    size = check_shape(name, shape, _TYPES[kind].itemsize)
    if held != size:
        raise ValueError(f"{name} of shape {shape} and type {kind} takes {size} bytes, but {held} are there")
    return Entry(_TYPES[kind], tuple(shape), tuple(parts))


def _text(handle: BinaryIO, name: str, parts: list[Span]) -> str:
    if sum(end - begin for begin, end in parts) > _MAX_TEXT:
        raise ValueError(f"the text {name} is longer than {_MAX_TEXT} bytes")
    data = b""
    for begin, end in parts:
        handle.seek(begin)
        data += handle.read(end - begin)
    # numpy fills up with zeros.
    return data.decode("utf-32-le").rstrip("\0")


def _value(handle: BinaryIO, span: Span) -> tuple[str, str, list[int], Span]:
    """Return the tag of a value and of its tensor the type, the lengths, and where the data lie."""
    outer = list(_fields(handle, span))
    if [number for number, _ in outer] != [1, 2]:
        raise ValueError("a value is no tensor with a name")
    dims: list[int] = []
    rest: dict[int, Span] = {}
    for number, item in _fields(handle, _span(outer[1][1])):
        if number == 1 and isinstance(item, int) and len(dims) < _MAX_AXES:
            dims.append(item)
        elif number in (2, 3) and number not in rest:
            rest[number] = _span(item)
        else:
            raise ValueError(f"a tensor has a field {number} too many")
    if rest.keys() != {2, 3}:
        raise ValueError("a tensor lacks its type or its data")
    return _word(handle, _span(outer[0][1])), _word(handle, rest[2]), dims, rest[3]


def _fields(handle: BinaryIO, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Yield the fields of a message: their number, and their number value or where their bytes lie."""
    place, end = span
    while place < end:
        handle.seek(place)
        key, value = _read_varint(handle), _read_varint(handle)
        place = handle.tell()
        if place > end or key & 7 not in (_VARINT, _BYTES) or key & 7 == _BYTES and value > end - place:
            raise ValueError(f"what stands before byte {place} is no field of a message")
        if key & 7 == _VARINT:
            yield key >> 3, value
        else:
            yield key >> 3, (place, place + value)
            place += value


def _span(item: int | Span) -> Span:
    if isinstance(item, int):
        raise ValueError("a number stands where text or data are due")
    return item


def _word(handle: BinaryIO, span: Span) -> str:
    begin, end = span
    if end - begin > _MAX_WORD:
        raise ValueError(f"a name or type is {end - begin} bytes long")
    handle.seek(begin)
    return handle.read(end - begin).decode("utf-8")


def _read_varint(handle: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = handle.read(1)
        if not byte:
            raise ValueError("it ends within a field")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number has more than 10 bytes")


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _field(number: int, data: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(data)) + data
