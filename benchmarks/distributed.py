"""What travels between two processes in a training step, and how long a step takes beside what the model says.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --shape wide --rounds 10

Measures an AllReduce of several sizes, from which latency and bandwidth follow; then a step of one process alone, of
two that share the batch (data parallel), and of two that share the layers (`split_linear`). The model, which is that of
docs/distributed.md: a ring of n processes moves 2 (n - 1) / n of the bytes of each AllReduce, and each costs its
latency. fp32, AdamW, graph mode, one processor for each process.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import get_rank, init
from models import SHAPES, STACKS, Stack, Step
from run import row

import mindpet_lite as mp

SIZES = (1, 2 ** 10, 2 ** 14, 2 ** 18, 2 ** 20, 2 ** 22)
COLUMN, ROW = ["to_q", "to_k", "to_v", "up"], ["to_out", "down"]
KINDS = ("alone", "data", "layers")
# Tells a process that it is one of those that measure.
WORK = "BENCHMARK_DISTRIBUTED"


class Sum(nn.Cell):
    """One AllReduce."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, x):
        return self.sum(x)


def summed(sums: Sum, value: Tensor) -> None:
    """Wait for the sum."""
    sums(value).asnumpy()


def median(call: Callable[[], object], rounds: int) -> float:
    """Return the median of the seconds of a call, after two that warm up."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def worker(kind: str, shape: Stack, rounds: int) -> None:
    """Measure as one of the processes; rank 0 writes what it found."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ.get("RANK_ID", 0))]})
    ms.set_context(mode=ms.GRAPH_MODE)
    found: dict[str, object] = {}
    if kind != "alone":
        init()
    if kind == "data":
        sums = Sum()
        for size in SIZES:
            value = Tensor(np.ones(size, np.float32))
            found[str(4 * size)] = median(functools.partial(summed, sums, value), rounds)
        ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=2)
    net = shape.net(nn.Dense)
    if kind == "layers":
        mp.split_linear(net, COLUMN, ROW)
    mp.get_pet_model(net, mp.LoraConfig(shape.rank, shape.rank, target_modules=list(shape.targets)))
    step = nn.TrainOneStepCell(net, nn.AdamWeightDecay(net.trainable_params())) if kind == "data" else Step(net)
    step.set_train()
    inputs = shape.inputs()
    found["step"] = median(lambda: step(*inputs).asnumpy(), rounds)
    found["sizes"] = [4 * item.size for item in net.trainable_params()]
    if kind == "alone" or get_rank() == 0:
        Path(f"{kind}.json").write_text(json.dumps(found))


def traffic(kind: str, shape: Stack, sizes: list[int]) -> list[int]:
    """Return the bytes of each AllReduce of a step.

    Args:
        kind: how the work is shared.
        shape: of the net.
        sizes: the bytes of each Parameter that trains.
    """
    if kind == "data":
        return sizes
    tokens = 4 * shape.batch * shape.tokens
    wide, low = tokens * shape.width, tokens * shape.rank
    # A block: to_out and down forward, to_q, to_k, to_v and up backward; LoRA's narrow side of to_out forward, those of
    # to_q, to_k and to_v backward.
    return shape.blocks * [wide, wide, wide, wide, wide, wide, low, low, low, low]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=STACKS, default="text", help="of models.py (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each (%(default)s)")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    assert isinstance(shape, Stack)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            start = [sys.executable] if kind == "alone" else [
                str(Path(sys.executable).with_name("msrun")), "--worker_num=2", "--local_worker_num=2", "--join=True",
                f"--log_dir={folder}/log"]
            # msrun takes a script's options for its own.
            environment = {**os.environ, WORK: f"{kind} {arguments.shape} {arguments.rounds}", "OMP_NUM_THREADS": "1",
                           "GLOG_v": "3", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            subprocess.run([*start, str(Path(__file__).resolve())], cwd=folder, env=environment, check=True,
                           stdout=subprocess.DEVNULL)
            found[kind] = json.loads(Path(folder, f"{kind}.json").read_text())
    largest = 4 * SIZES[-1]
    latency = found["data"]["4"]
    # Of two processes a ring moves 2 (n - 1) / n = 1 times the bytes.
    seconds_per_byte = (found["data"][str(largest)] - latency) / largest
    row("AllReduce of 4 bytes, 2 processes", f"{1e3 * latency:.2f} ms")
    row("bandwidth", f"{1e-9 / seconds_per_byte:.2f} GB/s")
    alone = found["alone"]["step"]
    row("step of one process", f"{1e3 * alone:.0f} ms")
    for kind, compute in (("data", alone), ("layers", alone / 2)):
        parts = traffic(kind, shape, found["alone"]["sizes"])
        said = compute + sum(latency + size * seconds_per_byte for size in parts)
        measured = found[kind]["step"]
        row(f"{kind}: {len(parts)} AllReduces of {sum(parts) / 1e6:.2f} MB", f"{1e3 * measured:.0f} ms",
            f"model {1e3 * said:.0f} ms", f"{measured / said:.2f}")


if __name__ == "__main__":
    if WORK in os.environ:
        own_kind, own_shape, own_rounds = os.environ[WORK].split()
        worker(own_kind, SHAPES[own_shape], int(own_rounds))
    else:
        main()
