"""What is waited for before the first step: the import, the injection, the compilation.

    python benchmarks/first_step.py
    python benchmarks/first_step.py --rounds 7 --layers 500 --blocks 8

Each figure is the median over processes of their own, which take turns. Compilation is the first call of a training
step, less the second one: a net of 32 blocks has 128 adapted layers. Injection is one call of get_pet_model on 2,000
layers, the first of its process; the base's Parameters must be the same objects on the same memory afterwards. The
import (of the layers and of what is done to nets) is timed after that of MindSpore, which it needs in any case.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import mindspore as ms
from fresh import fresh
from mindspore import nn
from models import Stack, Step, set_mode
from peers import build
from run import row

from mindpet_lite import LoraConfig, get_pet_model

IMPORTS = """import time; start = time.perf_counter(); import mindspore; middle = time.perf_counter()
import mindpet_lite.delta, mindpet_lite.graph; print(middle - start, time.perf_counter() - middle)"""


def compile_time(name: str, blocks: int) -> float:
    """Return the seconds that the first training step takes more than the second."""
    set_mode("graph")
    shape = Stack(blocks=blocks, width=64, batch=1, tokens=16, rank=8)
    training, inputs = Step(build(name, shape)).set_train(), shape.inputs()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        training(*inputs).asnumpy()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def injection_time(layers: int, width: int) -> tuple[float, float]:
    """Return the seconds of building a net of Dense layers, and of adapting them all; check that no weight moved."""
    start = time.perf_counter()
    net = nn.SequentialCell([nn.Dense(width, width) for _ in range(layers)])
    built = time.perf_counter() - start
    # Where a value lies: numpy sees a Parameter's own memory.
    before = [(item, item.name, item.asnumpy().ctypes.data) for item in net.get_parameters()]
    start = time.perf_counter()
    get_pet_model(net, LoraConfig(8, 16, target_modules="all-linear"))
    seconds = time.perf_counter() - start
    after = {id(item) for item in net.get_parameters()}
    copied = [name for item, name, place in before
              if id(item) not in after or item.name != name or item.asnumpy().ctypes.data != place]
    assert not copied, f"injection moved {copied[:3]}"
    assert len(net.trainable_params()) == 2 * layers
    return built, seconds


def import_times() -> tuple[float, float]:
    """Return the seconds of importing MindSpore in a new process, and of importing this package after it."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    one, other = done.stdout.split()[-2:]
    return float(one), float(other)


def help_time() -> float:
    """Return the seconds that the command line takes to print its help, which needs no MindSpore."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mindpet_lite", "--help"], capture_output=True, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2000, help="to inject")
    parser.add_argument("--blocks", type=int, default=32, help="to compile, with four adapted layers each")
    args = parser.parse_args()
    names = ["floor", "LoRA", "hand-written", "full"]
    compiled = [{name: fresh(compile_time, name, args.blocks) for name in names} for _ in range(args.rounds)]
    middle = {name: statistics.median(turn[name] for turn in compiled) for name in names}
    spread = max(abs(turn["floor"] / middle["floor"] - 1) for turn in compiled)
    for name in names:
        beside = f"{middle[name] / middle['floor']:.3f} of the floor, noise {spread:.3f}"
        row(f"compilation, {4 * args.blocks} layers adapted: {name}", f"{middle[name]:.2f} s", beside,
            "<= 1.30" if name == "LoRA" else "")
    injected = [fresh(injection_time, args.layers, 256) for _ in range(args.rounds)]
    built, seconds = (statistics.median(values) for values in zip(*injected))
    row(f"injection of {args.layers} layers, no weight copied", f"{seconds:.2f} s",
        f"{built:.2f} s to build the net; from {min(injected)[1]:.2f} to {max(injected)[1]:.2f} s",
        "<= 1 s" if args.layers == 2000 else "")
    imported = [import_times() for _ in range(args.rounds)]
    mindspore, own = (statistics.median(values) for values in zip(*imported))
    row("import, after MindSpore's", f"{own:.3f} s", f"{mindspore:.2f} s for MindSpore {ms.__version__}")
    row("mindpet-lite --help", f"{statistics.median(help_time() for _ in range(args.rounds)):.2f} s")


if __name__ == "__main__":
    main()
