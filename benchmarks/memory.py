"""Peak resident memory of training, inference, loading and merging, each in a process of its own.

    python benchmarks/memory.py                                  # the shape "wide": 100 M parameters, 1 x 256 tokens
    python benchmarks/memory.py --blocks 8 --width 1024          # as many, in more and smaller layers
    python benchmarks/memory.py --batch 4
    python benchmarks/memory.py --detail                         # where it comes from

What counts is the most that the process had in memory (VmHWM) above what it had when MindSpore and this package were
imported: weights, deltas, AdamW's moments, gradients, activations, the compiled graph and what its kernels hold. A step
is measured over three calls, the first of which compiles; fp32, graph mode. "recompute" keeps the input of each block
and computes it again on the way back.

--detail adds the most that MindSpore's memory pool held (activations, gradients; parameters are outside of it) and the
parameters with the optimizer's moments. The rest is the compiler and the kernels: on CPU each oneDNN matmul has scratch
memory of its own as long as the graph lives, a Transpose keeps 8 bytes for every element, and a sum or product of two
tensors of which one is broadcast keeps 16.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fresh import Peak, fresh
from mindspore import nn
from models import SHAPES, Stack, Step, set_mode
from peers import build
from run import row

import mindpet_lite

MB = 1e6
# (of what, beside what): the bar for the ratio.
BARS = {("LoRA", "full"): 0.45, ("LoRA, recompute", "full"): 0.30}


def step(name: str, recompute: bool, shape: Stack) -> tuple[int, int]:
    """Return the peak of three training steps, and the bytes of parameters and moments."""
    set_mode("graph")
    peak = Peak()
    net = build(name, shape)
    if recompute:
        for block in net.net:
            block.recompute()
    inputs, training = shape.inputs(), Step(net).set_train()
    for _ in range(3):
        training(*inputs).asnumpy()
    return peak.most(), _held(net, training)


def inference(shape: Stack) -> tuple[int, int]:
    """Return the peak of three calls of the net with LoRA in evaluation, and the bytes of its parameters."""
    set_mode("graph")
    peak = Peak()
    net, inputs = build("LoRA", shape).set_train(False), shape.inputs()
    for _ in range(3):
        net(*inputs).asnumpy()
    return peak.most(), _held(net)


def saved(shape: Stack, path: str) -> int:
    """Write an adapter and return its bytes."""
    set_mode("graph")
    folder = mindpet_lite.save_adapter(build("LoRA", shape), path)
    return sum(item.stat().st_size for item in folder.iterdir())


def loaded(shape: Stack, path: str) -> tuple[int, int]:
    """Return the peak of making the plain net and loading an adapter into it, and what the net takes."""
    set_mode("graph")
    peak = Peak()
    net = shape.net(nn.Dense)
    before = peak.now()
    peak.forget()
    mindpet_lite.load_adapter(net, path)
    return peak.most(), before


def merged(shape: Stack) -> tuple[int, int]:
    """Return the peak of merging, and what the adapted net takes before."""
    set_mode("graph")
    peak = Peak()
    net = build("LoRA", shape)
    before = peak.now()
    peak.forget()
    mindpet_lite.merge(net)
    return peak.most(), before


def _held(*cells: nn.Cell) -> int:
    """Return the bytes of all Parameters."""
    return sum(item.nbytes for item in {id(item): item for cell in cells for item in cell.get_parameters()}.values())


def pool(name: str, recompute: bool, shape: Stack) -> float:
    """Return the most that MindSpore's pool held in a training step, in MB, which MindSpore prints when it ends."""
    found = subprocess.run([sys.executable, __file__, "--alone", name, *(["--recompute"] if recompute else []),
                            *(f"--{size}={getattr(shape, size)}" for size in SIZES)],
                           env={**os.environ, "MS_MEMORY_STATISTIC": "2",
                                "MS_DEV_RUNTIME_CONF": "memory_statistics:True"},
                           capture_output=True, text=True)
    match = re.search(r"dynamic memory pool.*?actual peak used mem:(\d+)M", found.stdout + found.stderr)
    if not match:
        sys.exit(f"MindSpore printed no statistics of its memory:\n{found.stderr[-2000:]}")
    return int(match[1]) * 2 ** 20 / MB


SIZES = ("blocks", "width", "batch", "tokens", "rank")


def report(shape: Stack, detail: bool) -> None:
    """Print the rows."""
    found: dict[str, int] = {}
    for recompute in (False, True):
        for name in ("full", "LoRA", "floor"):
            label = f"{name}, recompute" if recompute else name
            found[label], held = fresh(step, name, recompute, shape)
            bar = BARS.get((label, "full"))
            row(f"step: {label}", f"{found[label] / MB:.0f} MB", f"{found[label] / found['full']:.3f} of full",
                f"<= {bar:.2f}" if bar else "")
            if detail:
                inside = pool(name, recompute, shape)
                row(f"step: {label}: parameters and moments, pool, rest",
                    f"{held / MB:.0f} + {inside:.0f} + {(found[label] - held) / MB - inside:.0f} MB")
    peak, held = fresh(inference, shape)
    row("inference with LoRA", f"{peak / MB:.0f} MB", f"{held / MB:.0f} MB of parameters")
    with tempfile.TemporaryDirectory() as folder:
        size = fresh(saved, shape, str(Path(folder) / "adapter"))
        peak, before = fresh(loaded, shape, str(Path(folder) / "adapter"))
    row("load_adapter", f"{(peak - before) / MB:.0f} MB above the net", f"{size / MB:.0f} MB of files")
    peak, before = fresh(merged, shape)
    adapted = shape.layers * shape.width ** 2 * 4
    row("merge in the net", f"{(peak - before) / MB:.0f} MB above the net",
        f"{adapted / MB:.0f} MB of adapted weights, kept for unmerge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, default=getattr(SHAPES["wide"], size))
    parser.add_argument("--detail", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = dataclasses.replace(SHAPES["wide"], **{size: getattr(args, size) for size in SIZES})
    if args.alone:
        step(args.alone, args.recompute, shape)
    else:
        report(shape, args.detail)


if __name__ == "__main__":
    main()
