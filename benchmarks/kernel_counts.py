"""Kernels of the compiled graphs, by type and shape, beside the floor's: on Ascend each is a launch.

    python benchmarks/kernel_counts.py --shape tiny                     # forward and training, ours beside the floor
    python benchmarks/kernel_counts.py --shape tiny --peers all         # MindPet and the others too, where installed
    python benchmarks/kernel_counts.py --shape tiny --detail            # what is added, by output shape
    python benchmarks/kernel_counts.py --table                          # rows of the runner's table, of three shapes

The kernels are read from the executors' list that MindSpore writes when told to save its graphs: what runs, in its
order, after all fusion. Reshapes are left out: they launch nothing. Forward is the net with its loss in evaluation;
training is the whole step with AdamW. The floor of the forward is the plain net, that of training has one bias
trainable at the bottom.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp())
# MindSpore reads these when it is imported; the last leaves out the states of a graph before the final one.
os.environ.update(MS_DEV_SAVE_GRAPHS="1", MS_DEV_SAVE_GRAPHS_PATH=str(FOLDER / "graphs"),
                  MS_DEV_DUMP_IR_PASSES="graph_build")

from mindspore import nn  # noqa: E402
from models import SHAPES, Stack, Step, UNet, set_mode  # noqa: E402
from peers import LIBRARIES, build, missing  # noqa: E402
from run import row  # noqa: E402

# kernel_graph0:MatMul-op4(...), and its shapes: <(16, 256)> <(8, 256)> -> <(16, 8)>.
KERNEL = re.compile(r"kernel_graph\d+:(\w+)-op\d+\(.*\n(?:\t# device.*\n)?\t# shape : .* -> (.*?) *$", re.MULTILINE)
NO_LAUNCH = ("Reshape", "ExpandDims", "Squeeze", "FlattenGrad", "Flatten")


def kernels(cell: nn.Cell, inputs: tuple) -> Counter[tuple[str, str]]:
    """Compile and run a cell; return how many kernels it has of every type and output shape."""
    shutil.rmtree(FOLDER / "graphs", ignore_errors=True)
    cell(*inputs)
    text = "".join(path.read_text() for path in (FOLDER / "graphs").rglob("final_actor_set_kernel_graph*.ir"))
    found = Counter(match.groups() for match in KERNEL.finditer(text))
    assert found, "MindSpore wrote no list of executors"
    return Counter({key: count for key, count in found.items() if key[0] not in NO_LAUNCH})


def of_types(counts: Counter[tuple[str, str]]) -> Counter[str]:
    types: Counter[str] = Counter()
    for (kind, _), count in counts.items():
        types[kind] += count
    return types


def graphs(name: str, shape: Stack | UNet) -> dict[str, Counter[tuple[str, str]]]:
    """Return the kernels of the forward and of the training graph of a net."""
    net = build(name, shape)
    forward = kernels(net.set_train(False), shape.inputs())
    return {"forward": forward, "training": kernels(Step(net).set_train(), shape.inputs())}


def show(graph: str, counts: dict[str, Counter[tuple[str, str]]], shape: Stack | UNet, detail: bool) -> None:
    """Print a table: a line for each type of kernel, and with `detail` each output shape that differs."""
    tables = {name: count if detail else of_types(count) for name, count in counts.items()}
    keys = sorted({key for table in tables.values() for key in table},
                  key=lambda key: -max(table[key] for table in tables.values()))
    if detail:
        keys = [key for key in keys if len({table[key] for table in tables.values()}) > 1]
    width = max(len(" ".join(key) if detail else key) for key in keys)
    columns = [max(len(name), 6) for name in tables]

    def line(label: str, values: list[str]) -> None:
        print(f"{label:{width}}  " + "  ".join(f"{value:>{size}}" for value, size in zip(values, columns)))

    print(f"\n{graph}{', kernels whose number differs' if detail else ''}")
    line("", list(tables))
    for key in keys:
        line(" ".join(key) if detail else key, [str(table[key] or "") for table in tables.values()])
    line("all", [str(count.total()) for count in counts.values()])
    base = counts["floor"].total()
    line("added a layer", [f"{(count.total() - base) / shape.layers:.2f}" for count in counts.values()])


def added(name: str, counts: dict[str, Counter[tuple[str, str]]], layers: int) -> str:
    """Say what a net has more than the floor a layer, by type."""
    more = of_types(counts[name])
    more.subtract(of_types(counts["floor"]))
    parts = ", ".join(f"{count / layers:+.2f} {kind}" for kind, count in more.most_common() if count)
    return f"{(counts[name].total() - counts['floor'].total()) / layers:.2f} ({parts})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: tiny; with --table text and unet-tiny too")
    parser.add_argument("--peers", nargs="+", default=[], help=f"all, or some of: {', '.join(LIBRARIES)}")
    parser.add_argument("--detail", action="store_true", help="by output shape, where numbers differ")
    parser.add_argument("--table", action="store_true", help="rows of the runner's table")
    args = parser.parse_args()
    set_mode("graph")
    wanted = list(LIBRARIES) if args.peers == ["all"] else args.peers
    names = ["floor", "LoRA", *(name for name in wanted if not missing(name))]
    try:
        for label in args.shape or (["tiny", "text", "unet-tiny"] if args.table else ["tiny"]):
            shape = SHAPES[label]
            nets = {name: graphs(name, shape) for name in names}
            for graph in ("forward", "training"):
                counts = {name: net[graph] for name, net in nets.items()}
                for name in names[1:] if args.table else []:
                    bar = "<= 4" if (graph, name) == ("forward", "LoRA") else ""
                    row(f"{label}, {graph}, kernels that {name} adds a layer", added(name, counts, shape.layers),
                        f"{counts['floor'].total()} in the floor", bar)
                if not args.table:
                    print(f"\n# {label}: {shape.layers} layers adapted")
                    show(graph, counts, shape, args.detail)
    finally:
        shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
