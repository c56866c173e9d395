"""The check of operators against MindSpore's documentation of Ascend, on small graphs, and what it reports."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: MindSpore learns at its import that it is to write its graphs.
CHECK = '''
import json, shutil, sys
sys.path.insert(0, sys.argv[1])
import ascend_ops
import mindspore as ms
import numpy as np
from ascend_graphs import STEPS, Graph, GuidedStep, layer_graphs
from diffusion import Schedule
from mindspore import Tensor, ops
from samplers import sample
from unet import UNetModel


def draw():
    unet = UNetModel(8, 4, 4, 32, (1,), 1, (1,), 4, context_dim=16)
    latents, texts, empty = (np.ones(shape, np.float32) for shape in ((2, 4, 8, 8), (2, 3, 16), (1, 3, 16)))
    step = GuidedStep(unet)
    for guidance in (2.0, 3.0):
        sample(step, latents, texts, empty, Schedule(), steps=STEPS, guidance=guidance)


def two_shapes():
    net = ms.nn.SequentialCell(ms.nn.ReLU())
    for rows in (1, 2):
        net(Tensor(np.ones((rows, 2)), ms.float32))


class CpuOnly:
    """Adds nothing.

    Args:
        x: float32.

    Supported Platforms:
        ``CPU``
    """


class Single(CpuOnly):
    __doc__ = CpuOnly.__doc__.replace("``CPU``", "``Ascend`` ``CPU``")


names = ("LoRA on Dense,", "LoRA on Conv2d,", "LoRA on Embedding,", "LoRA on mint Conv2d,", "Adapter,")
small = [graph for graph in layer_graphs(ms.float32) if graph.name.startswith(names)] + [Graph("sampling", draw)]
uses, problems = ascend_ops.collect(small)
_, twice = ascend_ops.collect([Graph("two shapes", two_shapes)])
ops.CpuOnly, ops.Single = CpuOnly, Single
node = ascend_ops.nodes_of("""
  %0(equiv_1_x) = PrimFunc_Add(%para1_x, I64(-1)) {instance name: add}
      : (<Tensor[Float32], (-1, 4)>, <Int64, NoShape>) -> (<Tensor[Float32], (-1, 4)>)
      # Fullname with scope: (Default/Add-op0)
  %1(CNode_2) = Relu(%0)
      : (<Tensor[Float16], (3, 4)>) -> (<Tensor[Float16], (3, 4)>)
  %2(CNode_3) = %1[@FuncUnion @a, @b](%0)
      : (<Tensor[Float16], (3, 4)>) -> (<Tensor[Float16], (3, 4)>)
""")
print(json.dumps({
    "uses": {name: {place: sorted(types) for place, types in places.items()} for name, places in uses.items()},
    "problems": problems + ascend_ops.check(uses), "twice": twice,
    "made up": ascend_ops.check({"CpuOnly": {"a net": {"Float32"}}, "NoSuchThing": {"a net": set()},
                                 "PyExecute": {"a net": set()},
                                 "Single": {"a net": {"Float16"}, "another": {"Float32"}}}),
    "bfloat16": ascend_ops.unnamed({"GeLU": {"a net": {"BFloat16"}, "another": {"Float16"}},
                                    "BiasAdd": {"a net": {"BFloat16"}}}, "BFloat16"),
    "stands for": {operator: "Ascend" in ascend_ops.documentation(operator).platforms
                   for operator in ascend_ops.STANDS_FOR.values()},
    "nodes": [[one.primitive, sorted(one.types), bool(ascend_ops.UNKNOWN_SIZE.search(one.signature))] for one in node],
    "table": ascend_ops.table({"ReLU": {"a net, Float32": {"Float32"}},
                               "ReluGrad": {"a net, Float16": {"Float16"}}}, markdown=True)}))
shutil.rmtree(ascend_ops.FOLDER)
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    done = subprocess.run([sys.executable, "-c", CHECK, str(ROOT / "benchmarks")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path_factory.mktemp("check"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_small_graphs_have_no_problem(found):
    assert found["problems"] == []


def test_primitives_are_found_where_they_are(found):
    uses = found["uses"]
    for place, primitives in {
            "LoRA on Dense, Float32": {"MatMul", "Mul", "AdamWeightDecay", "AssignAdd", "Select", "Sqrt", "IsFinite"},
            "LoRA on Conv2d, Float32": {"Conv2D", "Conv2DBackpropFilter"},
            "LoRA on mint Conv2d, Float32": {"Conv2DExt", "ConvolutionGrad"},
            "LoRA on Embedding, Float32": {"Gather"},
            "Adapter, Float32": {"GeLU", "GeLUGrad"},
            # The U-Net of Ascend: CPU's has none of these three.
            "sampling": {"GroupNorm", "LayerNorm", "Softmax", "BatchMatMul", "Conv2D"}}.items():
        assert primitives <= {name for name, places in uses.items() if place in places}, place
    assert uses["Conv2DExt"] == {"LoRA on mint Conv2d, Float32": ["Float32"]}


def test_what_ascend_lacks_is_reported_with_its_place(found):
    assert found["made up"] == [
        "CpuOnly runs on CPU by the documentation of CpuOnly, not on Ascend; it is in: a net",
        "NoSuchThing is not documented, nor in STANDS_FOR; it is in: a net",
        "PyExecute calls back into Python; it is in: a net",
        "Single gets float16, and the documentation of Single names float32 without it; it is in: a net"]


def test_a_type_that_documentation_leaves_out_is_reported(found):
    """GeLU's says float16, float32 or float64; BiasAdd's says "all Number type"."""
    assert found["bfloat16"] == ["GeLU gets bfloat16, and the documentation of GeLU names float32 without it; "
                                 "it is in: a net"]


def test_what_stands_for_the_undocumented_is_documented_for_ascend(found):
    assert found["stands for"]["LayerNorm"] and all(found["stands for"].values())


def test_a_second_compilation_is_reported(found):
    assert found["twice"] == ["two shapes: 2 graphs were compiled, expected 1"]


def test_nodes_types_and_unknown_sizes_are_read(found):
    assert found["nodes"] == [["Add", ["Float32"], True], ["Relu", ["Float16"], False], ["call", ["Float16"], False]]


def test_the_table_names_the_documentation(found):
    assert found["table"].splitlines()[-1] == \
        "| relu | ReLU, ReluGrad | Ascend, GPU, CPU | - | float16, float32 | a net |"
