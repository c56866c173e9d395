"""A file of tensors written again with some of its values changed, and every byte read back."""
from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mindpet_lite.formats.files import BF16, Entry, TensorFile
from mindpet_lite.offline.base import open_file, spans
from mindpet_lite.offline.changes import Change, Fill
from mindpet_lite.offline.numbers import widened

_BLOCK = 4 << 20
_SAMPLE = 1 << 16
# Blocks on their way: being changed, waiting to be written, being read back.
_UNDER_WAY = 8
_THREADS = max(2, min(4, os.cpu_count() or 1))
# MindSpore's checksum at the end of a checkpoint: this, and 10 bytes.
_CRC, _CRC_BYTES = b"crc_num", 10
# The distance between neighbours, of 1.
_ROUNDING = {BF16: 2 ** -7, np.dtype("<f2"): 2 ** -10, np.dtype("<f4"): 1e-6, np.dtype("<f8"): 1e-6}


class _Block(NamedTuple):
    """A piece of the file on its way from the base to the new file.

    Args:
        data: its bytes.
        changed: done when they are the new ones; None for those that stay.
        memory: what can be used again after it; None where the next piece needs it still.
    """

    data: np.ndarray
    changed: Future[None] | None
    memory: np.ndarray | None


def rewrite(source: TensorFile, target: Path, changes: Mapping[str, Change], advance: Callable[[int], None]) -> None:
    """Write `source` to `target` with the changes; all else, its header too, stays byte for byte.

    A few blocks are in memory at a time. They are changed and, once written, read back and compared in other threads.
    In the end a few rows of each changed tensor are made again and compared with the file.

    Args:
        source: the open file.
        target: a new file.
        changes: by the names in the file; types and shapes stay.
        advance: told how many bytes were written.

    Raises:
        OSError: `target` cannot be written or read.
        ValueError: a new value would not be finite; or what was read back is not what was written.
    """
    fills = {name: _start(source, name, change) for name, change in changes.items() if spans(source)[name].parts}
    rows = [_row_size(spans(source)[name]) for name in fills]
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(source.path.open("rb", buffering=0))
        writer = stack.enter_context(_Writer(target, max([_BLOCK, *rows]), advance))
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))
        waiting: deque[_Block] = deque()
        end, has_checksum = _end(reader)
        for block in _blocks(source, reader, end, fills, pool, writer):
            waiting.append(block)
            if len(waiting) > _UNDER_WAY // 2:
                writer.write(waiting.popleft())
        while waiting:
            writer.write(waiting.popleft())
        if has_checksum:
            data = np.frombuffer(_CRC + writer.checksum.to_bytes(_CRC_BYTES, "big"), np.uint8)
            writer.write(_Block(data, None, None))
        writer.settle()
    _check(source, target, fills)


class _Writer:
    """A file that is written in one thread and read back in another, with memory for the blocks on their way.

    Args:
        path: of the new file.
        size: of the largest block.
        advance: told how many bytes were written.
    """

    def __init__(self, path: Path, size: int, advance: Callable[[int], None]) -> None:
        self.checksum, self._advance, self._has_checksum = 0, advance, path.suffix == ".ckpt"
        self._free = [np.empty(size, np.uint8) for _ in range(_UNDER_WAY)]
        self._found = np.empty(size, np.uint8)
        self._busy: deque[tuple[Future[None], np.ndarray | None]] = deque()
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(path.open("xb", buffering=0))
            self._reader = stack.enter_context(path.open("rb", buffering=0))
            self._pool = stack.enter_context(ThreadPoolExecutor(1))
            self._stack = stack.pop_all()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def memory(self) -> np.ndarray:
        """Return memory for a block; it waits until there is some."""
        while not self._free:
            self._settle_one()
        return self._free.pop()

    def write(self, block: _Block) -> None:
        """Write a block once it is changed, and let it be read back."""
        if block.changed is not None:
            block.changed.result()
        written = 0
        while written < block.data.size:
            written += self._file.write(block.data[written:].data)
        if self._has_checksum:
            self.checksum = zlib.crc32(block.data.data, self.checksum)
        self._busy.append((self._pool.submit(self._read_back, block.data), block.memory))
        self._advance(block.data.size)

    def settle(self) -> None:
        """Wait until all that was written has been read back."""
        while self._busy:
            self._settle_one()

    def _settle_one(self) -> None:
        done, memory = self._busy.popleft()
        done.result()
        if memory is not None:
            self._free.append(memory)

    def _read_back(self, data: np.ndarray) -> None:
        found = self._found[:data.size]
        # Eight bytes at a time where that is possible.
        kind = np.uint64 if data.size % 8 == 0 else np.uint8
        if self._reader.readinto(found.data) != data.size or not np.array_equal(found.view(kind), data.view(kind)):
            raise ValueError("what was read back from the disk is not what was written: the disk or the memory is "
                             "faulty.")


def _blocks(source: TensorFile, reader: BinaryIO, end: int, fills: Mapping[str, Fill], pool: ThreadPoolExecutor,
            writer: _Writer) -> Iterator[_Block]:
    """Yield the file up to `end` in order, the changed tensors on their way through `pool`."""
    entries = {name: entry for name, entry in spans(source).items() if name in fills}
    place = 0
    for name in sorted(entries, key=lambda name: entries[name].parts):
        entry = entries[name]
        row, count = _row_size(entry), entry.shape[0] if entry.shape else 1
        step = max(1, _BLOCK // max(1, row))
        for first in range(0, count if row else 0, step):
            memory = writer.memory()
            data = memory[:min(step, count - first) * row]
            # A checkpoint may have other bytes within a tensor.
            pieces = _pieces(entry.parts, first * row, first * row + data.size)
            _read(reader, pieces, data)
            changed = pool.submit(fills[name], data.view(entry.dtype).reshape(len(data) // row, -1), first)
            done = 0
            for begin, stop in pieces:
                yield from _same(reader, place, begin, writer)
                yield _Block(data[done:done + stop - begin], changed, memory if stop == pieces[-1][1] else None)
                done, place = done + stop - begin, stop
    yield from _same(reader, place, end, writer)


def _same(reader: BinaryIO, begin: int, end: int, writer: _Writer) -> Iterator[_Block]:
    """Yield a stretch of the file that stays as it is."""
    while begin < end:
        memory = writer.memory()
        data = memory[:min(_BLOCK, end - begin)]
        _read(reader, [(begin, begin + data.size)], data)
        yield _Block(data, None, memory)
        begin += data.size


def _start(source: TensorFile, name: str, change: Change) -> Fill:
    """Return what changes a tensor, with its name in errors."""
    fill = change.start(lambda: source.read(name))

    def named(rows: np.ndarray, first: int) -> None:
        try:
            fill(rows, first)
        except ValueError as error:
            raise ValueError(f"{name} of {source.path}: {error}") from error
    return named


def _row_size(entry: Entry) -> int:
    """Return the bytes of a row, where a tensor is a matrix of its first axis and all others."""
    return math.prod(entry.shape[1:]) * entry.dtype.itemsize


def _pieces(parts: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """Return where the bytes from `begin` to `end` of a tensor lie in its file."""
    found, before = [], 0
    for start, stop in parts:
        size = stop - start
        low, high = max(begin - before, 0), min(end - before, size)
        if low < high:
            found.append((start + low, start + high))
        before += size
    return found


def _read(reader: BinaryIO, pieces: Sequence[tuple[int, int]], data: np.ndarray) -> None:
    done = 0
    for begin, end in pieces:
        reader.seek(begin)
        while begin < end:
            count = reader.readinto(data[done:done + end - begin].data)  # type: ignore[attr-defined]
            if not count:
                raise ValueError("the base was cut short while it was read.")
            begin, done = begin + count, done + count


def _end(reader: BinaryIO) -> tuple[int, bool]:
    """Return where the file ends but for MindSpore's checksum, and whether it has one."""
    end = reader.seek(0, os.SEEK_END)
    place = max(end - len(_CRC) - _CRC_BYTES, 0)
    reader.seek(place)
    return (place, True) if reader.read(len(_CRC)) == _CRC else (end, False)


def _check(source: TensorFile, target: Path, fills: Mapping[str, Fill]) -> None:
    """Compare what the new file's header says, and a few rows of each changed tensor with rows made again."""
    with open_file(target) as file, source.path.open("rb", buffering=0) as old, target.open("rb", buffering=0) as new:
        same = [(name, file.shape(name), file.dtype(name)) for name in file.keys()] == \
            [(name, source.shape(name), source.dtype(name)) for name in source.keys()]
        for name, fill in fills.items() if same else ():
            entry, place = spans(source)[name], spans(file)[name]
            row, count = _row_size(entry), entry.shape[0] if entry.shape else 1
            step = min(count, max(1, _SAMPLE // max(1, row)))
            first = (count - step) // 2
            wanted, found = np.empty((2, step * row), np.uint8)
            _read(old, _pieces(entry.parts, first * row, (first + step) * row), wanted)
            _read(new, _pieces(place.parts, first * row, (first + step) * row), found)
            fill(wanted.view(entry.dtype).reshape(step, -1), first)
            one, other = widened(found.view(entry.dtype)), widened(wanted.view(entry.dtype))
            # Sums may come in another order in blocks of another size.
            same = same and np.allclose(one, other, rtol=0, atol=_ROUNDING[entry.dtype] * np.abs(other).max(initial=0))
    if not same:
        raise ValueError(f"{target.name} does not hold what was written to it: the disk or the memory is faulty.")
