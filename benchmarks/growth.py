"""How time and memory of a training step grow: with rank, tokens, depth and the number of adapted layers.

    python benchmarks/growth.py                                  # the shape "many": 4 blocks, width 320, 8 x 256 tokens
    python benchmarks/growth.py --shape text --rounds 40
    python benchmarks/growth.py --only rank

Steps run in turns, graph mode, fp32, and a line is fitted by least squares to the medians: its slope, and the largest
distance of a point from it as a share of the largest value.

Time against rank is compared with what its arithmetic takes. On t rows a layer of width n with rank r has, beside its
weight, six products of 2 t n r operations: x Aᵀ and (x Aᵀ) Bᵀ forward; G B, Gᵀ (x Aᵀ), (G B)ᵀ x and (G B) A backward,
where G is the gradient of its output. Where nothing below trains (the first block's q, k and v) the last is not needed.
The machine's speed at these shapes is measured: the products by themselves, each in a graph that runs them many times,
and a line through their times against the rank. What the step's slope has more than that is AdamW (a few passes over
2 n r numbers a layer, limited by memory), measured by itself and shown beside it, and the scaling of x Aᵀ.

Memory is the peak of a process of its own, as in memory.py.
"""
from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import mindspore as ms
import numpy as np
from fresh import fresh
from memory import step as step_memory
from mindspore import Parameter, Tensor, nn, ops
from models import SHAPES, Stack, Step, set_mode
from peers import build
from run import row

RANKS = (4, 16, 64, 128, 256)
REPEATS = 8


class Products(nn.Cell):
    """The products that LoRA adds to a layer, many times in one graph; the inputs differ, so that none is left out.

    Args:
        needs_input_gradient: whether something below the layer trains.
    """

    def __init__(self, needs_input_gradient: bool) -> None:
        super().__init__()
        self.plain, self.left, self.right = ops.MatMul(), ops.MatMul(transpose_a=True), ops.MatMul(transpose_b=True)
        self.needs_input_gradient = needs_input_gradient

    def construct(self, inputs, a, b):
        results = ()
        for x, gradient in inputs:
            low, back = self.right(x, a), self.plain(gradient, b)
            results += (self.left(back, x), self.right(low, b), self.left(gradient, low))
            if self.needs_input_gradient:
                results += (self.plain(back, a),)
        return results


def products(shape: Stack) -> dict[Products, int]:
    """Return the products of the kinds of layers, and how many layers there are of each."""
    return {Products(True): shape.layers - 3, Products(False): 3}


def operations(shape: Stack) -> int:
    """Return the operations of these products for a rank of 1."""
    return (6 * shape.layers - 3) * 2 * shape.batch * shape.tokens * shape.width


def product_time(shape: Stack, rank: int) -> Callable[[], float]:
    """Return what measures the seconds of all products that LoRA of a rank adds to a step."""
    rng, rows = np.random.default_rng(1), shape.batch * shape.tokens

    def random(*sizes: int) -> Tensor:
        return Tensor(rng.standard_normal(sizes), ms.float32)

    inputs = tuple((random(rows, shape.width), random(rows, shape.width)) for _ in range(REPEATS))
    a, b = random(rank, shape.width), random(shape.width, rank)
    cells = products(shape)

    def timed() -> float:
        seconds = 0.0
        for cell, layers in cells.items():
            start = time.perf_counter()
            cell(inputs, a, b)[-1].asnumpy()
            seconds += (time.perf_counter() - start) / REPEATS * layers
        return seconds

    return timed


def adam_time(shape: Stack, rank: int) -> Callable[[], float]:
    """Return what measures the seconds of AdamW on the factors of a rank."""
    values = [np.zeros(size, np.float32) for _ in range(shape.layers) for size in ((rank, shape.width),
                                                                                  (shape.width, rank))]
    optimizer = nn.AdamWeightDecay([Parameter(Tensor(value), name=f"p{i}") for i, value in enumerate(values)], 1e-4)
    gradients = tuple(Tensor(value + 1) for value in values)

    def timed() -> float:
        start = time.perf_counter()
        optimizer(gradients)
        ms.runtime.synchronize()
        return time.perf_counter() - start

    return timed


def step_time(name: str, shape: Stack) -> Callable[[], float]:
    """Return what measures the seconds of a training step."""
    training, inputs = Step(build(name, shape)).set_train(), shape.inputs()

    def timed() -> float:
        start = time.perf_counter()
        training(*inputs).asnumpy()
        return time.perf_counter() - start

    return timed


def medians(timers: dict, rounds: int) -> dict:
    """Return the median of each timer, run in turns after two turns to warm up."""
    times: dict = {key: [] for key in timers}
    for turn in range(rounds + 2):
        for key, timed in timers.items():
            seconds = timed()
            if turn >= 2:
                times[key].append(seconds)
    return {key: statistics.median(values) for key, values in times.items()}


def fit(points: dict[int, float]) -> tuple[float, float, float]:
    """Return start and slope of a line through points, and its largest error as a share of the largest value."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    slope, start = np.polyfit(x, y, 1)
    return float(start), float(slope), float(np.abs(start + slope * x - y).max() / y.max())


def by_rank(shape: Stack, rounds: int) -> None:
    """Compare the slope of the step's time against the rank with that of the products."""
    shapes = {rank: dataclasses.replace(shape, rank=rank) for rank in RANKS}
    timers: dict = {("floor", 0): step_time("floor", shape)}
    for rank, item in shapes.items():
        timers |= {("step", rank): step_time("LoRA", item), ("products", rank): product_time(item, rank),
                   ("AdamW", rank): adam_time(item, rank)}
    found = medians(timers, rounds)
    slopes = {}
    for kind in ("step", "products", "AdamW"):
        start, slopes[kind], error = fit({rank: found[kind, rank] for rank in RANKS})
        beside = f"{1e3 * start:.2f} ms at rank 0, error {error:.3f}"
        row(f"time by rank, {RANKS[0]} to {RANKS[-1]}: {kind}", f"{1e6 * slopes[kind]:.1f} us a rank",
            beside + (f", floor {1e3 * found['floor', 0]:.2f} ms" if kind == "step" else ""))
    row("speed of the products", f"{operations(shape) / slopes['products'] / 1e9:.0f} GFLOP/s")
    row("slope of the step / of its products", f"{slopes['step'] / slopes['products']:.3f}",
        f"{slopes['step'] / (slopes['products'] + slopes['AdamW']):.3f} with AdamW", "0.75 to 1.25")


def by_size(shape: Stack, field: str, sizes: tuple[int, ...], unit: str, rounds: int) -> None:
    """Print the slopes of the floor's and LoRA's time, and of LoRA's peak memory, against a size of the net."""
    shapes = {size: dataclasses.replace(shape, **{field: size}) for size in sizes}
    found = medians({(name, size): step_time(name, item) for name in ("floor", "LoRA")
                     for size, item in shapes.items()}, rounds)
    for name in ("floor", "LoRA"):
        start, slope, error = fit({size: found[name, size] for size in sizes})
        row(f"time by {field}, {sizes[0]} to {sizes[-1]}: {name}", f"{1e6 * slope:.1f} us {unit}",
            f"{1e3 * start:.2f} ms at 0, error {error:.3f}")
    memory_by(shape, field, {size: item for size, item in shapes.items()}, unit)


def memory_by(shape: Stack, field: str, shapes: dict[int, Stack], unit: str) -> None:
    """Print the slope of LoRA's peak memory."""
    start, slope, error = fit({size: fresh(step_memory, "LoRA", False, item)[0] for size, item in shapes.items()})
    row(f"memory by {field}, {min(shapes)} to {max(shapes)}: LoRA", f"{slope / 1e6:.3f} MB {unit}",
        f"{start / 1e6:.0f} MB at 0, error {error:.3f}")


def by_layers(shape: Stack, rounds: int) -> None:
    """Print the slopes against the number of adapted layers, from one kind a block to all four."""
    shapes = {kinds * shape.blocks: dataclasses.replace(shape, targets=shape.targets[:kinds]) for kinds in (1, 2, 3, 4)}
    found = medians({size: step_time("LoRA", item) for size, item in shapes.items()}, rounds)
    start, slope, error = fit(found)
    row(f"time by adapted layers, {min(shapes)} to {max(shapes)}: LoRA", f"{1e6 * slope:.1f} us a layer",
        f"{1e3 * start:.2f} ms at 0, error {error:.3f}")
    memory_by(shape, "adapted layers", shapes, "a layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name, shape in SHAPES.items() if isinstance(shape, Stack)],
                        default="many")
    parser.add_argument("--only", nargs="+", choices=("rank", "tokens", "depth", "layers"))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    set_mode("graph")
    shape, only = SHAPES[args.shape], args.only or ("rank", "tokens", "depth", "layers")
    if "rank" in only:
        by_rank(shape, args.rounds)
        memory_by(shape, "rank", {rank: dataclasses.replace(shape, rank=rank) for rank in (4, 64, 256)}, "a rank")
    if "tokens" in only:
        by_size(shape, "tokens", (32, 64, 128, 256), "a token of each row of the batch", args.rounds)
    if "depth" in only:
        by_size(shape, "blocks", (1, 2, 4, 8), "a block", args.rounds)
    if "layers" in only:
        by_layers(shape, args.rounds)


if __name__ == "__main__":
    main()
