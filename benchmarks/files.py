"""Reading, writing and merging files beside a plain read, write or copy of the same bytes, in GB/s.

    python benchmarks/files.py                                   # an adapter of 134 MB, a base of 2 GB in bfloat16
    python benchmarks/files.py --gigabytes 0.5 --rank 16 --rounds 3

Each pair takes turns after a turn to warm up, and medians are compared; what is read is in the page cache then. Both
sides take new memory for what they read, as memory that a machine gave back to its host is slow to come again, and both
wait for the disk where an adapter is saved, because save_adapter does: a save must not be lost. The base is written
without waiting, as in merge_files.py, which measures merging in more detail.

load_adapter reads the file, checks every name, shape and value, and puts the values into the Parameters; the plain side
reads the bytes and copies them once.
"""
from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from merge_files import DTYPES, LINEAR, copy, make_adapter, make_base, merged, shapes_of
from mindspore import nn
from models import set_mode
from run import row

import mindpet_lite
from mindpet_lite.formats.files import open_tensors, read_tensors


def turns(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Return the median seconds of two functions that run in turns, after a turn that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for work, seconds in zip((one, other), times):
            start = time.perf_counter()
            work()
            if turn:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def report(what: str, beside: str, size: int, seconds: tuple[float, float]) -> None:
    own, plain = seconds
    row(what, f"{size / own / 1e9:.2f} GB/s", f"{size / plain / 1e9:.2f} GB/s for {beside}: {own / plain:.2f} times")


def read_plainly(path: Path, sizes: list[int]) -> list[np.ndarray]:
    """Read the last bytes of a file into new arrays of these sizes."""
    arrays = []
    with path.open("rb", buffering=0) as source:
        source.seek(-sum(sizes), os.SEEK_END)
        for size in sizes:
            arrays.append(np.empty(size, np.uint8))
            assert source.readinto(arrays[-1].data) == size
    return arrays


def sizes_in(path: Path) -> list[int]:
    """Return the bytes of each tensor of a file."""
    with open_tensors(path) as file:
        return [math.prod(file.shape(name)) * file.dtype(name).itemsize for name in file.keys()]


def write_plainly(data: bytes, folder: Path) -> None:
    """Write a new file and wait until the disk has it and its name."""
    folder.mkdir(exist_ok=True)
    path = folder / "file.new"
    with path.open("wb", buffering=0) as target:
        left = memoryview(data)
        while left:
            left = left[target.write(left):]
        os.fsync(target.fileno())
    os.replace(path, folder / "file")
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def adapters(folder: Path, layers: int, width: int, rank: int, rounds: int) -> None:
    """Save and load the adapter of a net."""
    net = nn.SequentialCell([nn.Dense(width, width, has_bias=False) for _ in range(layers)])
    mindpet_lite.get_pet_model(net, mindpet_lite.LoraConfig(rank, rank, target_modules="all-linear"))
    saved = mindpet_lite.save_adapter(net, folder / "adapter") / "adapter_model.safetensors"
    size, data = saved.stat().st_size, saved.read_bytes()
    sizes = sizes_in(saved)
    homes = [array.copy() for array in read_plainly(saved, sizes)]

    def plain_load() -> None:
        for home, array in zip(homes, read_plainly(saved, sizes)):
            home[:] = array

    what = f"an adapter of {layers} layers, {size / 1e6:.0f} MB"
    report(f"save_adapter, {what}", "a plain write", size, turns(
        lambda: mindpet_lite.save_adapter(net, folder / "adapter"), lambda: write_plainly(data, folder / "plain"),
        rounds))
    report(f"load_adapter, {what}", "a plain read and copy", size, turns(
        lambda: mindpet_lite.load_adapter(net, folder / "adapter"), plain_load, rounds))


def bases(folder: Path, gigabytes: float, rounds: int) -> None:
    """Read a base of several files, and merge an adapter into it."""
    dtype, places = DTYPES["bfloat16"], (folder / "base", folder / "base_adapter", folder / "out")
    shapes = shapes_of(gigabytes * 1e9, dtype)
    places[0].mkdir()
    size = make_base(places[0], shapes, dtype, shards=4)
    make_adapter(places[1], shapes, [name.rpartition(".")[2] for name in LINEAR], rank=16)
    sizes = {path: sizes_in(path) for path in places[0].glob("*.safetensors")}

    def emptied(work: Callable[[Path, Path, Path], None]) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(places[2], ignore_errors=True)
            work(*places)
        return run

    def read() -> None:
        for path in sizes:
            read_tensors(path)

    def plain_read() -> None:
        for path, each in sizes.items():
            read_plainly(path, each)

    report(f"reading a base of {size / 1e9:.1f} GB", "a plain read", size, turns(read, plain_read, rounds))
    report(f"merging files of {size / 1e9:.1f} GB", "a copy", size, turns(emptied(merged), emptied(copy), rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure; default: that for temporary files")
    args = parser.parse_args()
    set_mode("graph")
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        adapters(folder, args.layers, args.width, args.rank, args.rounds)
        bases(folder, args.gigabytes, args.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
