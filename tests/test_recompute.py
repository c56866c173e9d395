"""Recomputation by one call: what it saves, that gradients stay, what it refuses."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from nets import config, inputs, load_values, randomise, unchanged

import mindpet_lite as mp


class Block(nn.Cell):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm((width,)), nn.Dense(width, 8), nn.Dense(8, width)
        self.drop = nn.Dropout(p=0.5)

    def construct(self, x, scale):
        h = ops.tanh(self.up(self.norm(x)))
        return x + self.down(self.drop(h * h)) * scale


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.CellList([Block(), Block(), Block()])
        self.head = nn.Dense(6, 3)

    def construct(self, x):
        for block in self.blocks:
            x = block(x, 0.5)
        return self.head(x)


def gradients(net: nn.Cell, steps: int = 2) -> list[np.ndarray]:
    """Return loss and gradients of some steps in a row, which draw different dropout masks."""
    ms.set_seed(7)
    net.set_train()
    step = ms.value_and_grad(squares(net), None, net.trainable_params())
    found = []
    for _ in range(steps):
        loss, parts = step(inputs(4, 5, 6))
        found += [loss.asnumpy(), *(part.asnumpy() for part in parts)]
    return found


def squares(net: nn.Cell):
    def loss(x):
        return (net(x) ** 2).sum()

    return loss


def adapted(before: bool, after: bool) -> nn.Cell:
    """Return a net with the same values each time, recomputed before or after it is adapted, or not at all."""
    ms.set_seed(1)
    net = Net()
    rng = np.random.default_rng(3)
    for parameter in net.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32) * 0.4))
    if before:
        assert mp.net_recompute(net, r"blocks\.\d+") == ["blocks.0", "blocks.1", "blocks.2"]
    mp.get_pet_model(net, config(["up", "down"], lora_dropout=0.25))
    randomise(net)
    if after:
        net(inputs(4, 5, 6))
        mp.net_recompute(net, ["blocks.0", "1", "blocks.2"])
    return net


def test_gradients_are_equal_before_after_and_undone(mode):
    """With dropout in the blocks and in LoRA: the mask is the same when it is computed again."""
    expected = gradients(adapted(False, False))
    half = len(expected) // 2
    assert all(np.any(item) for item in expected)
    assert not np.array_equal(expected[1], expected[half + 1])
    for before, after in ((True, False), (False, True)):
        net = adapted(before, after)
        found = gradients(net)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert mp.undo_recompute(net) == ["blocks.0", "blocks.1", "blocks.2"]
    for ours, theirs in zip(gradients(net), expected):
        np.testing.assert_array_equal(ours, theirs)


SAVED = """
import sys
import mindspore as ms
from mindspore import nn, ops
sys.path[:0] = {paths!r}
import mindpet_lite as mp
from test_recompute import Net, gradients

ms.set_context(mode=ms.GRAPH_MODE)
net = Net()
if {change!r}:
    mp.net_recompute(net, "blocks.*[0-9]")
if {change!r} == "undone":
    gradients(net, 1)
    mp.undo_recompute(net)
ms.set_context(save_graphs=1, save_graphs_path={folder!r})
gradients(net, 1)
"""


def tanhs_of_the_compiled_step(folder: Path, change: str) -> int:
    """Return how often the compiled training step has a Tanh."""
    code = SAVED.format(paths=[str(Path(mp.__file__).parents[1]), str(Path(__file__).parent)], change=change,
                        folder=str(folder))
    # Without `env` a process inherits what MindSpore's own code has set in this one besides os.environ.
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300,
                            env=dict(os.environ))
    assert result.returncode == 0, result.stderr[-2000:]
    graph = max(folder.rglob("*validate*.ir"), key=os.path.getmtime).read_text(encoding="utf-8")
    return graph.count("= PrimFunc_Tanh(")


@pytest.mark.parametrize("change, expected", [("recomputed", 6), ("undone", 3)])
def test_the_compiled_step_computes_again_and_no_more_after_undo(tmp_path, change, expected):
    assert tanhs_of_the_compiled_step(tmp_path, change) == expected


def test_it_counts_calls_in_pynative(pynative_mode):
    calls = []

    class Counted(Block):
        def construct(self, x, scale):
            calls.append(1)
            return super().construct(x, scale)

    net = Net()
    net.blocks[1] = Counted()
    for change, expected in ((None, 1), (mp.net_recompute, 2), (mp.undo_recompute, 1)):
        if change:
            change(net, *(["blocks.1"],) if change is mp.net_recompute else ())
        calls.clear()
        gradients(net, 1)
        assert len(calls) == expected


def test_it_stays_through_merge_and_unmerge(mode):
    net, other = adapted(False, False), adapted(False, False)
    mp.net_recompute(net, ["up"])
    for each in (net, other):
        mp.merge(each)
        mp.unmerge(each)
    assert mp.undo_recompute(net) == ["blocks.0.up", "blocks.1.up", "blocks.2.up"]
    load_values(net, other)
    for ours, theirs in zip(gradients(net, 1), gradients(other, 1)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_shared_block_is_recomputed_once():
    net = Net()
    net.again = net.blocks[0]
    assert mp.net_recompute(net, r"blocks\.0|again") == ["blocks.0"]
    assert mp.undo_recompute(net) == ["blocks.0"]


class Counter(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Parameter(Tensor(0.0, ms.float32), requires_grad=False)

    def construct(self, x):
        self.seen += 1.0
        return x


class Assigning(Counter):
    def construct(self, x):
        ops.assign(self.seen, x.sum())
        return x


@pytest.mark.parametrize("pattern, words", [
    ("block", "hits nothing; it must match a layer's whole path, such as 'blocks.0'. Did you mean 'blocks'"),
    (["blocks.0", "bloks.1"], "entry 'bloks.1' hits nothing"),
    ("blocks.(", "is no regular expression"),
    (r"blocks\.\d.*", "blocks.0: blocks.0.norm lies inside it"),
    (".*", "the net itself: blocks lies inside it"),
    (["blocks"], "blocks: a CellList is never called itself: name the cells in it, such as blocks.0."),
    (["more"], "more: bn inside it (BatchNorm1d) writes Parameters when it runs, and would do so twice."),
    (["counter"], "counter: it (Counter) writes Parameters"),
    (["assigning"], "assigning: it (Assigning) writes Parameters"),
    ("", "pattern must name something"),
    ([], "pattern must name something"),
])
def test_refusals_leave_the_net_as_it_was(pattern, words):
    net = Net()
    net.more = nn.SequentialCell(nn.Dense(6, 6))
    net.more.insert_child_to_cell("bn", nn.BatchNorm1d(6))
    net.counter, net.assigning = Counter(), Assigning()
    with unchanged(net), pytest.raises(ValueError) as error:
        mp.net_recompute(net, pattern)
    assert words in str(error.value)
    with pytest.raises(ValueError, match="nothing to undo"):
        mp.undo_recompute(net)


def test_what_is_recomputed_already_is_refused():
    net = Net()
    net.blocks[1].recompute()
    for pattern, words in (("blocks.1", "it is recomputed already"), (["blocks.1.up"], "it lies inside blocks.1"),
                           (["blocks.0", "blocks.1"], "call undo_recompute(net) first")):
        with pytest.raises(ValueError) as error:
            mp.net_recompute(net, pattern)
        assert words in str(error.value)
    assert mp.undo_recompute(net) == ["blocks.1"]
    mp.net_recompute(net, ["blocks.1.up"])
    with pytest.raises(ValueError, match="blocks.1: up inside it is recomputed already"):
        mp.net_recompute(net, ["blocks.1"])


def test_wrong_types():
    with pytest.raises(TypeError, match="net must be"):
        mp.net_recompute("net", ".*")
    with pytest.raises(TypeError, match="net must be"):
        mp.undo_recompute(None)
    for pattern in (None, 3, [1], {"blocks": 1}):
        with pytest.raises(TypeError, match="pattern must be a regular expression or a list of names"):
            mp.net_recompute(Net(), pattern)
