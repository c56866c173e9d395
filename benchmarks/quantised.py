"""Memory and step time of quantised bases beside float32's.

    python benchmarks/quantised.py                    # both
    python benchmarks/quantised.py --only memory
    python benchmarks/quantised.py --only time --rounds 40 --shape text

Memory: layers of 2048 x 2048, one after the other, forward and gradient in graph mode on 8 rows, each kind in a process
of its own; the peak of the process (VmHWM) over what it had before the net was built, which happens layer by layer.
"whole" is that peak. In it are MindSpore's compiler and graph, about 2 MB a layer, which have nothing to do with
weights: "weights" is it less the peak of the same net 64 wide. In "weights" there still is the one weight that is
whole at a time, with what it is made of (21 MB for int8, 54 for q8_0, 60 for nf4): "each layer" is what 24 layers take
more than 8, over 16, again less that of nets 64 wide. One run of nf4's differs from the next by up to 17 MB.

Time: the training step of a stack of transformer blocks (`models.py`) with LoRA on its attention and every linear layer
quantised, in turns with the same net in float32; medians, two processors.
"""
from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from fresh import Peak, fresh  # noqa: E402
from mindspore import Tensor, nn, ops  # noqa: E402
from models import SHAPES, STACKS, Stack, Step, set_mode  # noqa: E402
from run import row  # noqa: E402
from tqdm import tqdm  # noqa: E402

import mindpet_lite as mp  # noqa: E402

KINDS = ("int8", "q8_0", "nf4")
# The bars for memory and time, over float32's.
MEMORY, TIME = {"int8": 0.28, "nf4": 0.17}, {"int8": 1.25, "nf4": 1.6}
LAYERS, FEW, WIDE, NARROW, ROWS = 24, 8, 2048, 64, 8


class Chain(nn.Cell):
    """Layers one after the other, and a mean square."""

    def __init__(self, kind: str, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.SequentialCell([layer(kind, width) for _ in range(layers)])

    def construct(self, x):
        return ops.square(self.layers(x)).mean()


def layer(kind: str, width: int) -> nn.Cell:
    """Return a layer, quantised before the next one is made."""
    net = nn.SequentialCell(nn.Dense(width, width, has_bias=False))
    net[0].weight.set_data(Tensor(np.random.default_rng(0).standard_normal((width, width), np.float32) / width ** 0.5))
    return (net if kind == "float32" else mp.quantize_base(net, kind, ["0"]))[0]


def peak_of(kind: str, layers: int, width: int) -> int:
    """Return the peak of three calls of forward and gradient by the input, in bytes."""
    set_mode("graph")
    peak = Peak()
    net = Chain(kind, layers, width)
    for item in net.get_parameters():
        item.requires_grad = False
    # What building threw away, in float32 too.
    gc.collect()
    peak.forget()
    gradient = ms.value_and_grad(net)
    x = Tensor(np.ones((ROWS, width), np.float32))
    for _ in range(3):
        loss, slope = gradient(x)
        loss.asnumpy(), slope.asnumpy()
    return peak.most()


def memory() -> None:
    """Measure and print memory."""
    found = {(kind, layers, width): fresh(peak_of, kind, layers, width) for kind in ("float32", *KINDS)
             for layers in (FEW, LAYERS) for width in (NARROW, WIDE)}

    def parts(kind: str) -> dict[str, float]:
        more = [found[kind, layers, WIDE] - found[kind, layers, NARROW] for layers in (FEW, LAYERS)]
        return {"whole": found[kind, LAYERS, WIDE], "weights": more[1],
                "each layer": (more[1] - more[0]) / (LAYERS - FEW)}

    whole = parts("float32")
    for kind in ("float32", *KINDS):
        for name, value in parts(kind).items():
            bar = f"<= {MEMORY[kind]}" if kind in MEMORY and name != "whole" else ""
            row(f"{LAYERS} layers: {kind}, {name}", f"{value / 1e6:.1f} MB", f"{value / whole[name]:.3f} of float32",
                bar)


def timed_step(kind: str, shape: Stack) -> Callable[[], float]:
    """Return what runs a training step and gives its seconds."""
    ms.set_seed(1)
    net = shape.net(nn.Dense)
    if kind != "float32":
        mp.quantize_base(net, kind)
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=shape.rank, lora_alpha=2 * shape.rank,
                                        target_modules=list(shape.targets)))
    step, inputs = Step(net).set_train(), shape.inputs()

    def timed() -> float:
        start = time.perf_counter()
        step(*inputs).asnumpy()
        return time.perf_counter() - start

    return timed


def step_time(name: str, rounds: int) -> None:
    """Measure and print time."""
    set_mode("graph")
    shape = SHAPES[name]
    assert isinstance(shape, Stack)
    steps = {kind: timed_step(kind, shape) for kind in ("float32", *KINDS)}
    for timed in steps.values():
        timed()
        timed()
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in tqdm(range(rounds), desc="rounds"):
        for kind, timed in steps.items():
            times[kind].append(timed())
    for kind, values in times.items():
        # Of each round, so that what else the machine does counts for both.
        ratio = statistics.median(own / other for own, other in zip(values, times["float32"]))
        row(f"step, {name}: {kind}", f"{1e3 * statistics.median(values):.1f} ms", f"{ratio:.2f} of float32",
            f"<= {TIME[kind]}" if kind in TIME else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "time"])
    parser.add_argument("--shape", choices=STACKS, default="text", help="of models.py (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each (%(default)s)")
    arguments = parser.parse_args()
    if arguments.only != "memory":
        step_time(arguments.shape, arguments.rounds)
    if arguments.only != "time":
        memory()


if __name__ == "__main__":
    main()
