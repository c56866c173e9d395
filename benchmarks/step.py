"""Training steps in turns: LoRA, the floor, full fine-tuning, and the libraries beside this one, in one run.

    python benchmarks/step.py                                   # every shape, graph mode
    python benchmarks/step.py --shape text --rounds 40
    python benchmarks/step.py --shape tiny --mode pynative --peers all
    python benchmarks/step.py --shape text wide --torch .venv/bench/bin/python     # and PEFT on torch

The floor is what any tuning of a frozen base must pay: forward, backward down to the input, one bias trainable at the
bottom. Steps take turns (A B C A B C ...) and medians are compared, because a machine's speed drifts by more than the
differences; the floor stands there twice, and how far it is from itself is the machine's noise. All run on two
processors, torch in a process of its own that is asked for one step at a time. fp32, AdamW on what is trainable.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROCESSORS = 2
# Before MindSpore counts them; the process of torch inherits it.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:PROCESSORS])

from models import SHAPES, Stack, Step, UNet, set_mode  # noqa: E402
from peers import LIBRARIES, build, missing  # noqa: E402
from run import row  # noqa: E402
from tqdm import tqdm  # noqa: E402

OWN = ["floor", "LoRA", "floor again", "full"]
TORCH = ["torch floor", "PEFT, eager", "PEFT, compile"]
# (of what, beside the fastest of which, mode): the largest ratio by shape.
BARS: list[tuple[list[str], str, dict[str, float]]] = [
    (["floor"], "graph", {"tiny": 1.20, "text": 1.02, "wide": 1.02, "many": 1.06}),
    (["full"], "graph", {"tiny": 0.70, "text": 0.70, "wide": 0.68}),
    (["MindPet", "mindone", "as mindformers"], "graph", dict.fromkeys(SHAPES, 1.0) | {"tiny": 0.88, "many": 0.97}),
    (["MindPet, default (fp16)"], "graph", dict.fromkeys(SHAPES, 0.8)),
    (["MindPet"], "pynative", dict.fromkeys(SHAPES, 0.9)),
    (["PEFT, eager"], "graph", {"text": 1.10, "wide": 1.10}),
    (["PEFT, compile"], "graph", {"text": 1.10, "wide": 1.10}),
]
Timed = Callable[[], float]


def own_step(name: str, shape: Stack | UNet) -> Timed:
    """Return what runs one step in MindSpore and gives its seconds."""
    step, inputs = Step(build(name, shape)).set_train(), shape.inputs()

    def timed() -> float:
        start = time.perf_counter()
        step(*inputs).asnumpy()
        return time.perf_counter() - start

    return timed


def torch_command(python: str, shape: Stack) -> list[str]:
    """Return the command of the process that runs torch's steps."""
    sizes = ("blocks", "width", "heads", "batch", "tokens", "rank")
    return [python, str(Path(__file__).with_name("torch_step.py")),
            *(f"--{size}={getattr(shape, size)}" for size in sizes)]


def torch_step(process: subprocess.Popen, name: str) -> Timed:
    """Return what has torch's process run one step and gives its seconds."""
    def timed() -> float:
        process.stdin.write(name + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return timed


def measure(steps: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Return the median seconds of every step, run in turns, after three turns to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    # A net is compiled in its first turn.
    for turn in tqdm(range(rounds + 3), desc="turns", leave=False):
        for name, timed in steps.items():
            # Idle threads of the step before still turn for a while.
            time.sleep(0.005)
            seconds = timed()
            if turn >= 3:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def report(label: str, mode: str, medians: dict[str, float]) -> None:
    """Print the rows of a shape: every step beside the floor, then this package's beside each bar."""
    where, floor, lora = f"{label}, {mode}", medians["floor"], medians["LoRA"]
    for name, median in medians.items():
        row(f"{where}: {name}", f"{1000 * median:.2f} ms", f"{median / floor:.3f} of the floor")
    noise = abs(medians["floor again"] / floor - 1)
    for names, of_mode, bars in BARS:
        there = {name: medians[name] for name in names if name in medians}
        if there and mode == of_mode:
            fastest = min(there, key=lambda name: there[name])
            bar = f"<= {bars[label]:.2f}" if label in bars else ""
            row(f"{where}: LoRA / {'fastest, ' if len(names) > 1 else ''}{fastest}", f"{lora / there[fastest]:.3f}",
                f"noise {noise:.3f}", bar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--mode", choices=("graph", "pynative"), default="graph")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peers", nargs="+", default=[], help=f"all, or some of: {', '.join(LIBRARIES)}")
    parser.add_argument("--torch", help="the Python that has torch and PEFT")
    args = parser.parse_args()
    set_mode(args.mode)
    wanted = list(LIBRARIES) if args.peers == ["all"] else args.peers
    for name in wanted:
        if missing(name):
            print(f"{name} is left out: {missing(name)}", file=sys.stderr)
    names = OWN + [name for name in wanted if not missing(name)]
    for label in args.shape:
        shape = SHAPES[label]
        steps = {name: own_step(name, shape) for name in names}
        process = None
        if args.torch and isinstance(shape, Stack):
            process = subprocess.Popen(torch_command(args.torch, shape), stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True)
        if process:
            steps |= {name: torch_step(process, name) for name in TORCH}
        report(label, args.mode, measure(steps, args.rounds))
        if process:
            process.communicate()


if __name__ == "__main__":
    main()
