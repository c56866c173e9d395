"""`mindpet-lite merge` of a sharded base beside a plain read and write of the same bytes, in one run.

    python benchmarks/merge_files.py                               # 1 GB, bfloat16, four shards, rank 16 on all linear
    python benchmarks/merge_files.py --gigabytes 4
    python benchmarks/merge_files.py --dtype float16 --targets q_proj v_proj

The base is a stack of Llama blocks of width 4096 with its embedding; the system has it in memory before anything is
measured. Copy and merge run in turn, each in a new process that does it twice:

first   as it comes: the memory for the new files may be slow to get (a virtual machine may have given it back);
again   right after the same bytes were copied and removed once more, unmeasured, so that both get memory equally fast.

The second is the one to compare, by medians. Neither waits for the disk to have the bytes, unless --flush is given:
then both do. Memory is the largest resident size that the process had, above what it had when all was imported.
"""
import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mindpet_lite.formats.adapters import to_files, write_files
from mindpet_lite.formats.files import BF16, to_header
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.offline.merge import merge
from mindpet_lite.offline.numbers import rounded

WIDTH, INNER, VOCABULARY = 4096, 11008, 32000
LINEAR = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
          "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
          "mlp.down_proj": (WIDTH, INNER)}
DTYPES = {"bfloat16": BF16, "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
BLOCK = 8 << 20


def shapes_of(size: float, dtype: np.dtype) -> dict[str, tuple[int, ...]]:
    """Return shapes by name: the embedding, then as many blocks as fit into the size."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    block = sum(np.prod(shape) for shape in LINEAR.values()) * dtype.itemsize
    for number in range(max(1, round((size - VOCABULARY * WIDTH * dtype.itemsize) / block))):
        for name, shape in LINEAR.items():
            shapes[f"model.layers.{number}.{name}.weight"] = shape
        shapes[f"model.layers.{number}.input_layernorm.weight"] = (WIDTH,)
    return shapes


def make_base(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, shards: int) -> int:
    """Write a base of random values and return its bytes."""
    rng = np.random.default_rng(1)
    pool = rounded(rng.standard_normal(VOCABULARY * WIDTH, np.float32) * np.float32(0.02), dtype)
    names, index = list(shapes), {}
    for number in range(shards):
        own = names[len(names) * number // shards:len(names) * (number + 1) // shards]
        file = folder / f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, order = to_header({name: (dtype, shapes[name]) for name in own})
        with file.open("wb") as target:
            target.write(header)
            for name in order:
                target.write(pool[:int(np.prod(shapes[name]))].tobytes())
        index.update({name: file.name for name in own})
    size = sum(item.stat().st_size for item in folder.iterdir())
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": size}, "weight_map": index}))
    return size


def make_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], targets: list[str], rank: int) -> int:
    """Write an adapter of random values and return how many layers it has."""
    rng = np.random.default_rng(2)
    layers = {name.removesuffix(".weight"): LayerState(
        {"mindpet_delta_lora_a": rng.standard_normal((rank, shape[1]), np.float32) * np.float32(0.01),
         "mindpet_delta_lora_b": rng.standard_normal((shape[0], rank), np.float32) * np.float32(0.01)},
        {"lora_rank": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0})
        for name, shape in shapes.items() if any(name.endswith(f"{target}.weight") for target in targets)}
    write_files(to_files(AdapterState("lora", layers), "peft", folder))
    return len(layers)


def copy(base: Path, adapter: Path, out: Path) -> None:
    """Read and write every file of the base, through one buffer: new memory for each block takes 3 times as long."""
    out.mkdir()
    buffer = memoryview(bytearray(BLOCK))
    for path in base.iterdir():
        with path.open("rb", buffering=0) as source, (out / path.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(buffer[:count])


def merged(base: Path, adapter: Path, out: Path) -> None:
    merge(base, adapter, out, quiet=True)


def flush(folder: Path) -> None:
    """Wait until the disk has the files."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def measured(work, folders: tuple[Path, Path, Path], flushed: bool, result) -> None:
    """Put into a queue what `work` takes: (seconds, seconds of processors) first and again, and bytes of memory."""
    def peak() -> int:
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def timed() -> tuple[float, float]:
        busy, start = time.process_time(), time.perf_counter()
        work(*folders)
        if flushed:
            flush(folders[2])
        taken = time.perf_counter() - start, time.process_time() - busy
        shutil.rmtree(folders[2])
        return taken

    # Forget the peak of the imports, and of the process that started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    first = timed()
    copy(*folders)
    shutil.rmtree(folders[2])
    result.put((first, timed(), peak() - before))


def report(rows: dict[str, list]) -> None:
    """Print what `measured` gave in each round, by name."""
    for number, when in enumerate(("first", "again")):
        seconds = {name: [row[number][0] for row in found] for name, found in rows.items()}
        for name, values in seconds.items():
            busy = statistics.median(row[number][1] for row in rows[name])
            print(f"{when} {name:6}{statistics.median(values):6.2f} s (from {min(values):.2f} to {max(values):.2f}), "
                  f"{busy:5.2f} s of processors")
        ratios = [one / other for one, other in zip(seconds["merge"], seconds["copy"])]
        print(f"{when} merge / copy {statistics.median(seconds['merge']) / statistics.median(seconds['copy']):.2f} "
              f"(by round {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    for name, found in rows.items():
        print(f"{name} took {max(row[2] for row in found) / 1e6:.0f} MB above the imports")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=[name.rpartition(".")[2] for name in LINEAR])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flush", action="store_true", help="let both wait until the disk has the bytes")
    parser.add_argument("--folder", help="on the disk to measure; default: that for temporary files")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        shapes = shapes_of(args.gigabytes * 1e9, DTYPES[args.dtype])
        (folder / "base").mkdir()
        size = make_base(folder / "base", shapes, DTYPES[args.dtype], args.shards)
        layers = make_adapter(folder / "adapter", shapes, args.targets, args.rank)
        largest = max(int(np.prod(shape)) for shape in shapes.values()) * DTYPES[args.dtype].itemsize
        print(f"{size / 1e9:.2f} GB of {args.dtype} in {args.shards} shards, {layers} of {len(shapes)} tensors adapted "
              f"with rank {args.rank}, largest tensor {largest / 1e6:.0f} MB")
        spawn = multiprocessing.get_context("spawn")
        rows: dict[str, list] = {"copy": [], "merge": []}
        # Once for the base to be in the system's memory.
        copy(folder / "base", folder / "adapter", folder / "out")
        shutil.rmtree(folder / "out")
        for _ in range(args.rounds):
            for name, work in (("copy", copy), ("merge", merged)):
                result = spawn.Queue()
                process = spawn.Process(target=measured, args=(
                    work, (folder / "base", folder / "adapter", folder / "out"), args.flush, result))
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(f"{name} failed")
                rows[name].append(result.get())
        report(rows)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
