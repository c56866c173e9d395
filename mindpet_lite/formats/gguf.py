"""GGUF files, read as from a stranger: tensors in F32, F16, BF16, Q8_0, Q4_0 and Q4_1, one at a time.

Source: the specification of the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A block is 32
numbers with a float16 scale d: Q8_0 has int8 codes, w = d q; Q4_0 4 bits, w = d (q - 8); Q4_1 4 bits and a float16
minimum m, w = d q + m. Of 16 bytes with two codes each the lower halves are the first 16 numbers.
"""
from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np

from mindpet_lite.formats.files import BF16, as_float, check_name, check_shape, open_regular

_MAGIC = b"GGUF"
_BLOCK = 32
# By the number of a type: its name, and what one number, or one block, is in the file.
_CODES = ("q", "u1", (16,))
_TYPES: dict[int, tuple[str, np.dtype]] = {
    0: ("F32", np.dtype("<f4")), 1: ("F16", np.dtype("<f2")), 30: ("BF16", BF16),
    2: ("Q4_0", np.dtype([("d", "<f2"), _CODES])), 3: ("Q4_1", np.dtype([("d", "<f2"), ("m", "<f2"), _CODES])),
    8: ("Q8_0", np.dtype([("d", "<f2"), ("q", "i1", (_BLOCK,))]))}
_OTHERS = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
           20: "IQ4_NL", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
# Kinds whose numbers are int8 codes times a float16 for each 32, exactly.
EXACT = ("Q8_0", "Q4_0")
# Bytes of the simple types of metadata, by their number; texts and lists are apart.
_SIMPLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_MAX_TENSORS, _MAX_KEYS, _MAX_TEXT, _MAX_LIST, _MAX_AXES = 100_000, 100_000, 10_000_000, 10_000_000, 4


class Span(NamedTuple):
    """A tensor of a file: its type's name and form, its shape, and where its bytes begin."""

    kind: str
    form: np.dtype
    shape: tuple[int, ...]
    begin: int


class GgufFile:
    """An open GGUF file whose every number has been checked.

    Args:
        handle: the open file; closed with this object.
        path: its name in messages.

    Raises:
        ValueError: the file is damaged or no GGUF file, or a tensor has a name or type that we do not read.
    """

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self.path, self._handle = path, handle
        self._size = os.fstat(handle.fileno()).st_size
        try:
            self.spans = self._header()
        except (struct.error, UnicodeDecodeError, MemoryError) as error:
            raise ValueError(f"{path} is not a whole GGUF file: its header is cut short or damaged "
                             f"({error}).") from error

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._handle.close()

    def kind(self, name: str) -> str:
        """Return the name of a tensor's type, such as ``"Q8_0"``."""
        return self.spans[name].kind

    def read(self, name: str) -> np.ndarray:
        """Return the numbers of a tensor: float16 as it is, all else in float32."""
        span, raw = self.spans[name], self._raw(name)
        if span.kind in ("F32", "F16", "BF16"):
            return as_float(raw).reshape(span.shape)
        if span.kind == "Q4_1":
            found = _halves(raw["q"]) * raw["d"].astype(np.float32)[:, None] + raw["m"].astype(np.float32)[:, None]
        else:
            codes, scale = self.codes(name)
            found = codes.reshape(-1, _BLOCK) * scale.astype(np.float32).reshape(-1, 1)
        return found.astype(np.float32).reshape(span.shape)

    def codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return int8 codes in the tensor's shape, and a float16 for each 32 of them, of a kind in `EXACT`."""
        span, raw = self.spans[name], self._raw(name)
        codes = raw["q"] if span.kind == "Q8_0" else _halves(raw["q"]) - np.int8(8)
        return codes.reshape(span.shape), raw["d"].reshape(*span.shape[:-1], -1)

    def _raw(self, name: str) -> np.ndarray:
        span = self.spans[name]
        value = np.empty(math.prod(span.shape) // _per(span.form), span.form)
        self._handle.seek(span.begin)
        if value.nbytes and self._handle.readinto(value.view(np.uint8).data) != value.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{self.path} was cut short while it was read.")
        return value

    def _header(self) -> dict[str, Span]:
        """Return where each tensor lies."""
        if self._handle.read(4) != _MAGIC:
            raise ValueError(f"{self.path} is no GGUF file: it does not begin with {_MAGIC.decode()}.")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"{self.path} is GGUF of version {version}; versions 2 and 3 are read.")
        tensors, keys = self._count(_MAX_TENSORS), self._count(_MAX_KEYS)
        alignment = 32
        for _ in range(keys):
            key = self._text()
            value = self._value(self._number("<I"))
            alignment = value if key == "general.alignment" and isinstance(value, int) else alignment
        if not 0 < alignment <= 1 << 20:
            raise ValueError(f"{self.path} has an alignment of {alignment} bytes, which is none.")
        found = [self._tensor() for _ in range(tensors)]
        start = -(-self._handle.tell() // alignment) * alignment
        spans = {name: span._replace(begin=span.begin + start) for name, span in found}
        if len(spans) != len(found):
            raise ValueError(f"{self.path} has two tensors of one name.")
        for name, span in spans.items():
            end = span.begin + math.prod(span.shape) // _per(span.form) * span.form.itemsize
            if end > self._size:
                raise ValueError(f"{self.path} is not a whole GGUF file: {name} runs {end - self._size} bytes past its "
                                 f"end; copy it again.")
        return spans

    def _tensor(self) -> tuple[str, Span]:
        name = self._text()
        check_name(name)
        axes = self._number("<I")
        if axes > _MAX_AXES:
            raise ValueError(f"{self.path}: {name} has {axes} axes.")
        shape = [self._number("<Q") for _ in range(axes)][::-1]
        number, begin = self._number("<I"), self._number("<Q")
        if number not in _TYPES:
            raise ValueError(f"{self.path}: {name} is of type {_OTHERS.get(number, f'number {number}')}, which is not "
                             f"read; {', '.join(kind for kind, _ in _TYPES.values())} are. Write the file in one of "
                             f"them, such as Q8_0, with llama.cpp's llama-quantize.")
        kind, form = _TYPES[number]
        check_shape(name, shape, 4)
        if _per(form) > 1 and (not shape or shape[-1] % _BLOCK):
            raise ValueError(f"{self.path}: {name} of shape {shape} cannot be cut into blocks of {_BLOCK}.")
        return name, Span(kind, form, tuple(shape), begin)

    def _value(self, kind: int, depth: int = 0) -> object:
        if kind in _SIMPLE:
            return self._number(_SIMPLE[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _LIST or depth > 2:
            raise ValueError(f"{self.path} is not a whole GGUF file: its metadata have a value of type {kind}.")
        inner, count = self._number("<I"), self._count(_MAX_LIST)
        if inner in _SIMPLE:
            self._skip(count * struct.calcsize(_SIMPLE[inner]))
            return None
        for _ in range(count):
            self._value(inner, depth + 1)
        return None

    def _number(self, form: str) -> int:
        (found,) = struct.unpack(form, self._handle.read(struct.calcsize(form)))
        return found

    def _count(self, most: int) -> int:
        found = self._number("<Q")
        if found > most:
            raise ValueError(f"{self.path} is not a whole GGUF file: its header counts {found} things, at most {most} "
                             f"are read.")
        return found

    def _text(self) -> str:
        length = self._number("<Q")
        if length > min(_MAX_TEXT, self._size):
            raise ValueError(f"{self.path} is not a whole GGUF file: its header has a text of {length} bytes.")
        return self._handle.read(length).decode("utf-8")

    def _skip(self, count: int) -> None:
        if self._handle.tell() + count > self._size:
            raise ValueError(f"{self.path} is not a whole GGUF file: a list in its header runs past its end.")
        self._handle.seek(count, os.SEEK_CUR)


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file; nothing but its header is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `GgufFile`.
    """
    handle = open_regular(path)
    try:
        return GgufFile(handle, path)
    except BaseException:
        handle.close()
        raise


def _per(form: np.dtype) -> int:
    """Return how many numbers one item of a form is."""
    return _BLOCK if form.names and "d" in form.names else 1


def _halves(codes: np.ndarray) -> np.ndarray:
    """Return the 32 numbers of 4 bits in each row of 16 bytes."""
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.int8)
