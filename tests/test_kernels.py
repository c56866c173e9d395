"""How many kernels LoRA adds to the compiled graphs, and what answers need, by the benchmark that counts them."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: MindSpore learns at its import that it is to write its graphs.
COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import kernel_counts
from models import Stack
kernel_counts.set_mode("graph")
shape = Stack(blocks=2, width=32, batch=2, tokens=8, rank=4, heads=4)
found = {name: {graph: [[*key, count] for key, count in counts.items()]
                for graph, counts in kernel_counts.graphs(name, shape).items()} for name in ("floor", "LoRA")}
kernel_counts.shutil.rmtree(kernel_counts.FOLDER)
print(json.dumps(found))
"""
LAYERS = 8
# A decoder whose head is its embedding's table, on its cache: prompts, and a further token.
ANSWER = """
import json, sys
sys.path[:0] = sys.argv[1:]
import kernel_counts
from generation import Generator, Prompts
import causal_lm
import numpy as np
from mindspore import Tensor
kernel_counts.set_mode("graph")
causal_lm.SIZES.update(hidden_size=24, intermediate_size=32, num_attention_heads=3, num_key_value_heads=1,
                       vocab_size=64, head_dim=8)
cached = Generator(causal_lm.decoder(2), 1, 16)
one = Tensor(np.ones(1, np.int32))
found = [kernel_counts.of_types(kernel_counts.kernels(cell, inputs))
         for cell, inputs in ((cached.next, (one, one)),
                              (Prompts(cached.cached, 8), (Tensor(np.ones((1, 8), np.int32)), one)))]
kernel_counts.shutil.rmtree(kernel_counts.FOLDER)
print(json.dumps(found))
"""


def run(code: str, folder: Path, *paths: str):
    """What the code prints last."""
    done = subprocess.run([sys.executable, "-c", code, *(str(ROOT / path) for path in paths)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def added(tmp_path_factory) -> dict[str, dict[tuple[str, str], int]]:
    """For each graph, by type and output shape, how many kernels LoRA's has more than the floor's."""
    found = run(COUNT, tmp_path_factory.mktemp("count"), "benchmarks")
    counts = {name: {graph: {(kind, shape): count for kind, shape, count in rows} for graph, rows in graphs.items()}
              for name, graphs in found.items()}
    return {graph: {key: more for key in {**lora, **counts["floor"][graph]}
                    if (more := lora.get(key, 0) - counts["floor"][graph].get(key, 0))}
            for graph, lora in counts["LoRA"].items()}


def test_forward_has_two_products_a_scale_on_the_ranks_side_and_a_sum_more(added):
    assert added["forward"] == {("MatMul", "<(16, 4)>"): LAYERS, ("Mul", "<(16, 4)>"): LAYERS,
                                ("MatMul", "<(16, 32)>"): LAYERS, ("Add", "<(16, 32)>"): LAYERS}


def test_training_adds_what_the_gradients_need(added):
    kinds: dict[str, int] = {}
    for (kind, _), count in added["training"].items():
        kinds[kind] = kinds.get(kind, 0) + count
    # The input of the first block has no gradient, so there q, k and v lack theirs by W and by A; the floor's one bias
    # is not trained here.
    assert kinds["MatMul"] == 6 * LAYERS - 6 and kinds["Mul"] == 2 * LAYERS and kinds["Add"] == LAYERS
    assert kinds["AdamWeightDecay"] == 2 * LAYERS - 1
    # Of each block only to_out's input has gradients of its own to add: those of q, k and v are added in one sum, with
    # the floor's.
    assert kinds["AddN"] <= 2


def test_answers_copy_no_weight(tmp_path):
    """A graph that writes to its cache copies a table that it reads both before and after."""
    for counts in run(ANSWER, tmp_path, "benchmarks", "examples/causal_lm"):
        assert counts["MatMul"] >= 2 * 7 + 1 and counts["ScatterUpdate"] == 2 * 2
        assert "TensorMove" not in counts
