"""A file of tensors written again with some of its values changed, and every byte read back."""
from __future__ import annotations

import functools
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mindpet_lite.formats.files import BF16, Entry, TensorFile
from mindpet_lite.formats.float8 import F8_E4M3, F8_E5M2, F8_E8M0
from mindpet_lite.offline.base import open_file, spans
from mindpet_lite.offline.changes import Change, Fill, even_step
from mindpet_lite.offline.numbers import widened

_BLOCK = 1 << 20
_SAMPLE = 1 << 16
_THREADS = max(2, min(4, os.cpu_count() or 1))
# MindSpore's checksum at the end of a checkpoint: this, and 10 bytes.
_CRC, _CRC_BYTES = b"crc_num", 10
# The distance between neighbours, of 1.
_ROUNDING = {BF16: 2 ** -7, np.dtype("<f2"): 2 ** -10, np.dtype("<f4"): 1e-6, np.dtype("<f8"): 1e-6,
             F8_E4M3: 2 ** -3, F8_E5M2: 2 ** -2, F8_E8M0: 0.0}
# Where bytes lie in a file: (begin, end) each.
_Pieces = Sequence[tuple[int, int]]


class _Block(NamedTuple):
    """A few bytes of the file.

    Args:
        pieces: where they lie, in the base and in the new file.
        change: makes the new ones of the old ones, in place; None where they stay.
    """

    pieces: _Pieces
    change: Callable[[np.ndarray], None] | None


def rewrite(source: TensorFile, target: Path, changes: Mapping[str, Change], advance: Callable[[int], None]) -> None:
    """Write `source` to `target` with the changes; all else, its header too, stays byte for byte.

    A few threads take a block each, change it, write it, read it back and compare, while the processor's cache has it.
    In the end a few rows of each changed tensor are made again and compared with the file.

    Args:
        source: the open file.
        target: a new file.
        changes: by the names in the file; types and shapes stay.
        advance: told how many bytes were written; called in other threads, one at a time.

    Raises:
        OSError: `target` cannot be written or read.
        ValueError: a new value would not be finite; or what was read back is not what was written.
    """
    fills = {name: _start(source, name, change) for name, change in changes.items() if spans(source)[name].parts}
    size = max([_BLOCK, *(_row_size(spans(source)[name]) for name in fills)])
    target.open("xb").close()
    with source.path.open("rb", buffering=0) as reader:
        end, has_checksum = _end(reader)
        queue = _Queue(reader, _blocks(source, end, fills), advance)
        with ThreadPoolExecutor(_THREADS) as pool:
            workers = [pool.submit(_work, queue, target, size) for _ in range(_THREADS)]
            try:
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:
                queue.stop()
        for worker in workers:
            worker.result()
    if has_checksum:
        _add_checksum(target)
        advance(len(_CRC) + _CRC_BYTES)
    _check(source, target, fills)


class _Queue:
    """The blocks of a file for several threads, read in their order: systems read ahead for one who does so."""

    def __init__(self, reader: BinaryIO, blocks: Iterator[_Block], advance: Callable[[int], None]) -> None:
        self._reader, self._blocks, self._advance = reader, blocks, advance
        self._stopped, self._lock = False, threading.Lock()

    def take(self, memory: np.ndarray) -> tuple[_Block, np.ndarray] | None:
        """Return the next block and its bytes, in `memory`; None after the last."""
        with self._lock:
            block = None if self._stopped else next(self._blocks, None)
            if block is None:
                return None
            data = memory[:sum(end - begin for begin, end in block.pieces)]
            _read(self._reader, block.pieces, data)
            return block, data

    def done(self, count: int) -> None:
        """Tell how many bytes were written."""
        with self._lock:
            self._advance(count)

    def stop(self) -> None:
        """Have no more blocks."""
        self._stopped = True


def _work(queue: _Queue, target: Path, size: int) -> None:
    """Write blocks until there are no more; `size` is that of the largest."""
    memory, found = np.empty((2, size), np.uint8)
    with target.open("r+b", buffering=0) as file:
        while (taken := queue.take(memory)) is not None:
            block, data = taken
            if block.change is not None:
                block.change(data)
            _write(file, block.pieces, data)
            _read(file, block.pieces, found[:data.size])
            # Eight bytes at a time where that is possible.
            kind = np.uint64 if data.size % 8 == 0 else np.uint8
            if not np.array_equal(found[:data.size].view(kind), data.view(kind)):
                raise ValueError("what was read back from the disk is not what was written: the disk or the memory is "
                                 "faulty.")
            queue.done(data.size)


def _blocks(source: TensorFile, end: int, fills: Mapping[str, Fill]) -> Iterator[_Block]:
    """Yield the file up to `end` in order."""
    entries = {name: entry for name, entry in spans(source).items() if name in fills}
    place = 0
    for name in sorted(entries, key=lambda name: entries[name].parts):
        entry = entries[name]
        row, count = _row_size(entry), entry.shape[0] if entry.shape else 1
        step = even_step(count, _BLOCK // max(1, row))
        for first in range(0, count if row else 0, step):
            # A checkpoint may have other bytes within a tensor.
            pieces = _pieces(entry.parts, first * row, min(first + step, count) * row)
            for begin, stop in pieces:
                yield from _same(place, begin)
                place = stop
            yield _Block(pieces, functools.partial(_change, fills[name], entry.dtype, row, first))
    yield from _same(place, end)


def _same(begin: int, end: int) -> Iterator[_Block]:
    """Yield a stretch of the file that stays as it is."""
    for place in range(begin, end, _BLOCK):
        yield _Block([(place, min(place + _BLOCK, end))], None)


def _change(fill: Fill, dtype: np.dtype, row: int, first: int, data: np.ndarray) -> None:
    fill(data.view(dtype).reshape(data.size // row, -1), first)


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


def _pieces(parts: _Pieces, begin: int, end: int) -> list[tuple[int, int]]:
    """Return where the bytes from `begin` to `end` of a tensor lie in its file."""
    found, before = [], 0
    for start, stop in parts:
        size = stop - start
        low, high = max(begin - before, 0), min(end - before, size)
        if low < high:
            found.append((start + low, start + high))
        before += size
    return found


def _read(file: BinaryIO, pieces: _Pieces, data: np.ndarray) -> None:
    done = 0
    for begin, end in pieces:
        file.seek(begin)
        while begin < end:
            count = file.readinto(data[done:done + end - begin].data)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{file.name} was cut short while it was read.")
            begin, done = begin + count, done + count


def _write(file: BinaryIO, pieces: _Pieces, data: np.ndarray) -> None:
    done = 0
    for begin, end in pieces:
        file.seek(begin)
        while begin < end:
            count = file.write(data[done:done + end - begin].data)
            begin, done = begin + count, done + count


def _end(reader: BinaryIO) -> tuple[int, bool]:
    """Return where the file ends but for MindSpore's checksum, and whether it has one."""
    end = reader.seek(0, os.SEEK_END)
    place = max(end - len(_CRC) - _CRC_BYTES, 0)
    reader.seek(place)
    return (place, True) if reader.read(len(_CRC)) == _CRC else (end, False)


def _add_checksum(path: Path) -> None:
    """Add MindSpore's checksum to a checkpoint."""
    found, data = 0, bytearray(_BLOCK)
    with path.open("r+b", buffering=0) as file:
        while count := file.readinto(data):
            found = zlib.crc32(memoryview(data)[:count], found)
        file.write(_CRC + found.to_bytes(_CRC_BYTES, "big"))


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
