"""Where a training step's time goes, kernel by kernel: this package's LoRA beside the floor, or beside PEFT on torch.

    python benchmarks/profile_step.py --shape tiny                # beside the floor
    python benchmarks/profile_step.py --shape text --torch .venv/peers/bin/python
    python benchmarks/profile_step.py --table --torch .venv/peers/bin/python       # rows of the runner's table

Milliseconds a step as the profilers of MindSpore and torch give them, for each type of kernel. A profiler slows what it
watches: use these figures for where the time is, those of step.py for how much it is. Two kernels that run at the same
time both count, so that the sum can be more than the step; and the time between kernels is in no line.
"""
from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import tempfile
from pathlib import Path

from mindspore import profiler
from models import SHAPES, Stack, Step, UNet, set_mode
from peers import build
from run import row
from step import torch_command

# What is the same work in both: (kind, MindSpore's kernels, torch's operators).
KINDS = [
    ("dense products", r"MatMul", r"aten::(addmm|mm|linear)"),
    ("attention", r"BatchMatMul|Softmax.*|Transpose", r"aten::(bmm|_softmax.*|_scaled_dot.*)"),
    ("LayerNorm", r"LayerNorm.*", r"aten::native_layer_norm.*"),
    ("element by element, GeLU", r"Add|AddN|Mul|Sub|RealDiv|Pow|Square|Sigmoid.*|BiasAdd.*",
     r"aten::(add_?|mul_?|sub|div_?|pow|gelu.*|sum)"),
    ("AdamW", r"AdamWeightDecay|AssignAdd", r"aten::_fused.*|Optimizer.*"),
    ("copies, casts", r"Cast|Reshape|TensorMove|Slice.*|Concat", r"aten::(copy_|clone|fill_|empty.*)"),
]
Profile = dict[str, tuple[float, float]]


def own_profile(name: str, shape: Stack | UNet, rounds: int) -> Profile:
    """Return milliseconds and calls a step of every type of kernel."""
    step, inputs = Step(build(name, shape)).set_train(), shape.inputs()
    for _ in range(3):
        step(*inputs).asnumpy()
    with tempfile.TemporaryDirectory() as folder:
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU],
                              on_trace_ready=profiler.tensorboard_trace_handler(folder)):
            for _ in range(rounds):
                step(*inputs).asnumpy()
        file, = Path(folder).rglob("cpu_op_type_info_*.csv")
        with file.open() as lines:
            return {line["op_type"]: (float(line["total_compute_time"]) / rounds,
                                      int(line["type_occurrences"]) / rounds) for line in csv.DictReader(lines)}


def torch_profile(python: str, name: str, shape: Stack, rounds: int) -> Profile:
    """Return milliseconds and calls a step of every operator of torch."""
    command = [*torch_command(python, shape), "--profile", name, "--rounds", str(rounds)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def by_kind(found: Profile, column: int) -> dict[str, float]:
    """Return milliseconds by the kinds of work; what is of none is "other"."""
    sums = {kind: 0.0 for kind, *_ in KINDS} | {"other": 0.0}
    for name, (milliseconds, _) in found.items():
        kind = next((line[0] for line in KINDS if re.fullmatch(line[column], name)), "other")
        sums[kind] += milliseconds
    return sums


def show(title: str, found: Profile) -> None:
    """Print every kernel that takes a hundredth of the step."""
    total = sum(milliseconds for milliseconds, _ in found.values())
    print(f"\n{title}: {total:.2f} ms in kernels\n{'kernel':44} {'ms a step':>10} {'calls':>7} {'us a call':>10}")
    for name, (milliseconds, calls) in sorted(found.items(), key=lambda item: -item[1][0]):
        if milliseconds >= total / 100:
            print(f"{name[:44]:44} {milliseconds:10.2f} {calls:7.0f} {1000 * milliseconds / calls:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["text", "wide"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--torch", help="the Python that has torch and PEFT; without it, beside the floor")
    parser.add_argument("--table", action="store_true", help="rows of the runner's table alone")
    args = parser.parse_args()
    set_mode("graph")
    for label in args.shape:
        shape = SHAPES[label]
        profiles = {"LoRA": own_profile("LoRA", shape, args.rounds)}
        other = "PEFT, eager" if args.torch and isinstance(shape, Stack) else "floor"
        profiles[other] = (own_profile(other, shape, args.rounds) if other == "floor"
                           else torch_profile(args.torch, other, shape, args.rounds))
        for name, found in profiles.items() if not args.table else []:
            show(f"{label}, {name}", found)
        ours, theirs = by_kind(profiles["LoRA"], 1), by_kind(profiles[other], 1 if other == "floor" else 2)
        for kind in ours:
            row(f"{label}, profile: {kind}", f"{ours[kind]:.2f} ms", f"{theirs[kind]:.2f} ms in {other}")


if __name__ == "__main__":
    main()
