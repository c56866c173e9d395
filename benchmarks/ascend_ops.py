"""Whether Ascend has what our graphs need, by MindSpore's own documentation; no Ascend is needed.

    python benchmarks/ascend_ops.py                         # all graphs, four minutes
    python benchmarks/ascend_ops.py --graphs Wukong         # those whose name contains this
    python benchmarks/ascend_ops.py --markdown ops.md       # the table as Markdown, too

The graphs are those that MindSpore's front-end hands to the backend, after optimisation and automatic differentiation
(`*_validate_*.ir`). Each primitive in them is looked up in the installed MindSpore's docstrings: its `Supported
Platforms` must list Ascend, and where it names float32 as a type it must name float16, too, if it gets that. A
primitive without documentation must be in `STANDS_FOR`. All shapes must be known, nothing may call back into Python,
and further steps must compile nothing. What does not hold is printed with the graphs that it is in, and the exit code
is 1. The same about bfloat16 is a remark: few docstrings name that type at all.

What is not seen: where MindSpore's Python or front-end asks for the device, the answer is CPU. So
`mindspore.amp.all_finite`, behind the loss scalers, is IsFinite here, while on a 910B it can be AllFinite. Ascend's
backend then fuses and replaces operators. AllReduce is only in graphs of several processes.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp())
# MindSpore reads these when it is imported; the last leaves out all states of a graph but the one that is read.
os.environ.update(MS_DEV_SAVE_GRAPHS="1", MS_DEV_SAVE_GRAPHS_PATH=str(FOLDER / "graphs"),
                  MS_DEV_DUMP_IR_PASSES="validate")

import mindspore as ms  # noqa: E402
from ascend_graphs import Graph, all_graphs  # noqa: E402
from mindspore import ops  # noqa: E402
from mindspore.ops import auto_generate  # noqa: E402

# Structure, order and calls; no operators. TensorMove keeps a Parameter's value that is overwritten before it is read.
COMPILER = {"Load", "UpdateState", "TupleGetItem", "MakeTuple", "Depend", "Return", "Partial", "Switch", "TensorMove",
            "call"}
HOST = {"PyExecute", "PyInterpret", "PyFunc", "Custom"}
# Primitives without documentation -> the documented operator that is made of them, or whose gradient is.
STANDS_FOR = {
    # Gradients.
    "BiasAddGrad": "BiasAdd", "Conv2DBackpropFilter": "Conv2D", "Conv2DBackpropInput": "Conv2D",
    "Conv3DBackpropFilter": "Conv3D", "ConvolutionGrad": "conv2d", "DropoutGrad": "Dropout",
    "GatherDGradV2": "gather_d", "GeLUGrad": "GeLU", "GroupNormGrad": "GroupNorm", "LayerNormGrad": "LayerNorm",
    "ReluGrad": "relu", "RsqrtGrad": "rsqrt", "SigmoidGrad": "sigmoid", "SiLUGrad": "silu",
    "SoftmaxBackward": "Softmax", "StridedSliceGrad": "strided_slice", "SwigluGrad": "swiglu",
    "TanhGrad": "tanh",
    # An operator with a number on one side, or with the sizes of parts.
    "Divs": "div", "EqScalar": "equal", "LessScalar": "less", "Muls": "mul", "RemainderTensorScalar": "remainder",
    "SplitWithSize": "split",
    # What functions of mindspore.mint are made of.
    "Conv1DExt": "conv1d", "Conv2DExt": "conv2d", "Conv3DExt": "conv3d", "MatMulExt": "matmul",
}
# %4(equiv_9_x) = PrimFunc_BiasAdd(%1, %2, I64(0)) ..., then a line with what it takes and gives:
#     : (<Tensor[Float32], (3, 4)>, <Tensor[Float32], (4)>, <Int64, NoShape>) -> (<Tensor[Float32], (3, 4)>)
NODE = re.compile(r"^  %\d+\([^)]*\) = (?:PrimFunc_)?(?:(\w+)\(|%|call)", re.MULTILINE)
SIGNATURE = re.compile(r"^      : (.*)$", re.MULTILINE)
UNKNOWN_SIZE = re.compile(r"[(\s]-[12][,)]")
TYPES = {"Float16": "float16", "BFloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Node:
    """A primitive in a graph, and the types and shapes that it takes and gives."""

    primitive: str
    signature: str

    @property
    def types(self) -> set[str]:
        """The types of the tensors."""
        return set(re.findall(r"Tensor\[(\w+)\]", self.signature))


@dataclasses.dataclass(frozen=True)
class Documentation:
    """What MindSpore says of an operator: where it runs, and which of its half types it names."""

    operator: str
    platforms: tuple[str, ...]
    text: str

    def says(self, dtype: str) -> bool:
        """Tell whether the text names a type, by itself or with all that are numbers."""
        return re.search(rf"\b{dtype}\b|all Number type", self.text) is not None


def nodes_of(text: str) -> list[Node]:
    """Return the nodes of a graph as MindSpore writes it."""
    found = list(NODE.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    nodes = []
    for match, end in zip(found, ends):
        signature = SIGNATURE.search(text, match.end(), end)
        nodes.append(Node(match[1] or "call", signature[1] if signature else ""))
    return nodes


def documentation(name: str) -> Documentation | None:
    """Find what says on which platforms an operator runs: its own docstring, or the function's that this refers to."""
    for home in (ops, auto_generate):
        text = getattr(getattr(home, name, None), "__doc__", None) or ""
        platforms = re.search(r"Supported Platforms:\s+(``.*``)", text)
        if platforms:
            # What comes after is examples.
            return Documentation(name, tuple(re.findall(r"\w+", platforms[1])), text[:platforms.start()])
        refers = re.search(r"Refer to :func:`mindspore\.ops\.(\w+)`", text)
        if refers and refers[1] != name:
            return documentation(refers[1])
    return None


def compile_graph(graph: Graph) -> list[str]:
    """Run a graph; return the texts of what was compiled."""
    shutil.rmtree(FOLDER / "graphs", ignore_errors=True)
    try:
        graph.run()
    except (RuntimeError, TypeError) as error:
        # The front-end's graph is written before the backend looks for kernels.
        if graph.has_kernels or "Kernel select failed" not in str(error):
            raise
    return [path.read_text() for path in sorted((FOLDER / "graphs").rglob("*_validate_*.ir"))]


def problem_of(primitive: str) -> str | None:
    """Return what is wrong with a primitive on Ascend."""
    if primitive in HOST:
        return "calls back into Python"
    known = documentation(STANDS_FOR.get(primitive, primitive))
    if known is None:
        return "is not documented, nor in STANDS_FOR"
    if "Ascend" not in known.platforms:
        return f"runs on {', '.join(known.platforms)} by the documentation of {known.operator}, not on Ascend"
    return None


def structure_problems(graph: Graph, texts: list[str]) -> list[str]:
    """Return what is wrong with what a graph compiled, apart from its primitives."""
    problems = []
    if len(texts) != graph.compiles:
        problems.append(f"{graph.name}: {len(texts)} graphs were compiled, expected {graph.compiles}")
    for node in (node for text in texts for node in nodes_of(text)):
        if UNKNOWN_SIZE.search(node.signature):
            problems.append(f"{graph.name}: a shape of {node.primitive} is not known when compiled: {node.signature}")
    return problems


def collect(graphs: Iterable[Graph]) -> tuple[dict[str, dict[str, set[str]]], list[str]]:
    """Compile graphs; return for each primitive its types in each graph, and what is wrong apart from primitives."""
    ms.set_context(mode=ms.GRAPH_MODE)
    uses: dict[str, dict[str, set[str]]] = {}
    problems = []
    for graph in graphs:
        texts = compile_graph(graph)
        problems += structure_problems(graph, texts)
        for node in (node for text in texts for node in nodes_of(text)):
            if node.primitive not in COMPILER:
                uses.setdefault(node.primitive, {}).setdefault(graph.name, set()).update(node.types)
        print(f"{graph.name}: {len(texts)} compiled", flush=True)
    return dict(sorted(uses.items())), problems


def check(uses: dict[str, dict[str, set[str]]]) -> list[str]:
    """Return what is wrong with the primitives, each with the graphs that it is in."""
    problems = [f"{primitive} {problem}; it is in: {'; '.join(places)}" for primitive, places in uses.items()
                if (problem := problem_of(primitive))]
    return problems + unnamed(uses, "Float16")


def unnamed(uses: dict[str, dict[str, set[str]]], kind: str) -> list[str]:
    """Return which primitives get a type that their documentation leaves out where it names float32."""
    found = []
    for primitive, places in uses.items():
        known = documentation(STANDS_FOR.get(primitive, primitive))
        where = [place for place, kinds in places.items() if kind in kinds]
        if where and known is not None and known.says("float32") and not known.says(TYPES[kind]):
            found.append(f"{primitive} gets {TYPES[kind]}, and the documentation of {known.operator} names float32 "
                         f"without it; it is in: {'; '.join(where)}")
    return found


def rows(uses: dict[str, dict[str, set[str]]]) -> list[list[str]]:
    """Return the table: a row for each documented operator, with the primitives that it stands for."""
    groups: dict[str, list[str]] = {}
    for primitive in uses:
        known = documentation(STANDS_FOR.get(primitive, primitive))
        groups.setdefault(known.operator if known else "-", []).append(primitive)
    return [[operator, ", ".join(primitives), *described(operator), types_of(uses, primitives),
             places_of(uses, primitives)] for operator, primitives in sorted(groups.items(), key=lambda item: item[1])]


def described(operator: str) -> list[str]:
    """Return an operator's platforms, and which half types its documentation names."""
    known = documentation(operator)
    if known is None:
        return ["-", "-"]
    return [", ".join(known.platforms), ", ".join(dtype for dtype in TYPES.values() if known.says(dtype)) or "-"]


def types_of(uses: dict[str, dict[str, set[str]]], primitives: list[str]) -> str:
    """Return the types that primitives get in all graphs."""
    return ", ".join(sorted({kind.lower() for name in primitives for kinds in uses[name].values() for kind in kinds}))


def places_of(uses: dict[str, dict[str, set[str]]], primitives: list[str]) -> str:
    """Return the names of graphs without types, each once; of more than three the number."""
    names = list(dict.fromkeys(re.sub(r"(, \w+| fp16)", "", place) for name in primitives for place in uses[name]))
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} graphs"


HEAD = ["documented as", "primitives", "platforms", "half types named", "types here", "where"]


def table(uses: dict[str, dict[str, set[str]]], markdown: bool) -> str:
    """Return the table as text, or as Markdown."""
    if markdown:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [HEAD, ["---"] * len(HEAD), *rows(uses)]) + "\n"
    lines = [HEAD, *rows(uses)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths)).rstrip() for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", default="", help="compile the graphs whose name contains this")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    args = parser.parse_args()
    try:
        uses, problems = collect(graph for graph in all_graphs() if args.graphs in graph.name)
    finally:
        shutil.rmtree(FOLDER)
    problems += check(uses)
    print(f"\n{table(uses, markdown=False)}\n\n{len(uses)} primitives, {len(problems)} problems")
    for line in [*problems, *(f"remark: {remark}" for remark in unnamed(uses, "BFloat16"))]:
        print(line)
    if args.markdown:
        args.markdown.write_text(table(uses, markdown=True), encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
