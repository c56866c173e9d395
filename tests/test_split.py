"""Layers split over two processes: the losses, adapter and files of one process that has the whole net."""
from __future__ import annotations

import numpy as np
import pytest
from jobs import run_job
from mindspore import nn
from safetensors.numpy import load_file

import mindpet_lite as mp

JOB = '''
import sys
import warnings

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.communication import get_rank, init

import mindpet_lite as mp

warnings.simplefilter("ignore")
ms.set_context(device_target="CPU")
count = int(sys.argv[1])
if count > 1:
    init()


class Block(nn.Cell):
    """A decoder block without norms: heads of 4, of which this process has those that arrive."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Dense(16, 16), nn.Dense(16, 8, has_bias=False), nn.Dense(16, 8)
        self.o_proj, self.up_proj, self.down_proj = nn.Dense(16, 16), nn.Dense(16, 24), nn.Dense(24, 16)

    def construct(self, x):
        batch, length, _ = x.shape
        q, k, v = (item.reshape(batch, length, -1, 4).transpose(0, 2, 1, 3)
                   for item in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        k, v = ops.repeat_interleave(k, 2, 1), ops.repeat_interleave(v, 2, 1)
        weights = ops.softmax(ops.matmul(q, k.swapaxes(2, 3)) / 2, -1)
        x = x + self.o_proj(ops.matmul(weights, v).transpose(0, 2, 1, 3).reshape(batch, length, -1))
        return x + self.down_proj(ops.silu(self.up_proj(x)))


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.CellList([Block(), Block()]), nn.Dense(16, 5)

    def construct(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def whole():
    values, net = np.random.RandomState(0), Net()
    for item in net.get_parameters():
        item.set_data(ms.Tensor(values.standard_normal(item.shape) / 6, ms.float32))
    return net


COLUMN, ROW = ["q_proj", "k_proj", "v_proj", "up_proj"], ["o_proj", "down_proj"]
data = np.random.RandomState(1)
x, y = (ms.Tensor(data.standard_normal(shape), ms.float32) for shape in ((3, 7, 16), (3, 7, 5)))
found = {}
for name, mode in (("graph", ms.GRAPH_MODE), ("pynative", ms.PYNATIVE_MODE)):
    ms.set_context(mode=mode)
    net = whole()
    if count > 1:
        assert mp.split_linear(net, COLUMN, ROW) == [
            f"blocks.{block}.{layer}" for block in range(2)
            for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")]
    found[f"{name} base"] = net(x).asnumpy()
    ms.set_seed(5)
    np.random.seed(5)
    mp.get_pet_model(net, mp.LoraConfig(4, 8, use_rslora=True, target_modules=[*COLUMN, *ROW]))
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()),
                               nn.AdamWeightDecay(net.trainable_params(), 0.002, weight_decay=0.1))
    found[f"{name} losses"] = np.array([step(x, y).asnumpy() for _ in range(5)])
    net.set_train(False)
    found[f"{name} output"] = net(x).asnumpy()
    mp.save_adapter(net, f"{name}_adapter")
    again = whole()
    if count > 1:
        mp.split_linear(again, COLUMN, ROW)
    mp.load_adapter(again, f"{name}_adapter")
    found[f"{name} loaded"] = again(x).asnumpy()
    mp.merge(again)
    found[f"{name} merged"] = again(x).asnumpy()
    said = []
    if count > 1:
        for field in ({"use_dora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}, {"lora_bias": True}):
            net = whole()
            mp.split_linear(net, COLUMN, ROW)
            try:
                mp.get_pet_model(net, mp.LoraConfig(4, 8, target_modules=["q_proj"], **field))
            except ValueError as error:
                said.append(str(error))
        try:
            mp.get_pet_model(net, mp.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        except ValueError as error:
            said.append(str(error))
        try:
            mp.split_linear(net, COLUMN, ROW)
        except ValueError as error:
            said.append(str(error))
        net = whole()
        before = net.parameters_dict().keys()
        for column, row in ((["head"], ["o_proj"]), (["nothing"], ["o_proj"]), (["q_proj"], ["q_proj"])):
            try:
                mp.split_linear(net, column, row)
            except ValueError as error:
                said.append(str(error))
        assert net.parameters_dict().keys() == before and not any("Split" in str(c) for c in net.cells())
        net = whole()
        mp.split_linear(net, COLUMN, ROW)
        try:
            mp.GradientAccumulation(net, nn.SGD(net.trainable_params()), 1, max_norm=1.0)
        except ValueError as error:
            said.append(str(error))
    found[f"{name} said"] = np.array(said)
np.savez(f"found_{count}_{get_rank() if count > 1 else 0}.npz", **found)
'''


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what one process found and what each of two did, and the folder."""
    folder = tmp_path_factory.mktemp("split")
    for count in (1, 2):
        (folder / str(count)).mkdir()
        done = run_job(JOB, folder / str(count), count, str(count))
        assert done.returncode == 0, done.stdout[-3000:]
    return (dict(np.load(folder / "1" / "found_1_0.npz")),
            [dict(np.load(folder / "2" / f"found_2_{rank}.npz")) for rank in range(2)], folder)


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_two_processes_compute_and_train_as_one(results, mode):
    alone, both, _ = results
    for of_rank in both:
        for what in ("base", "losses", "output", "loaded", "merged"):
            np.testing.assert_allclose(of_rank[f"{mode} {what}"], alone[f"{mode} {what}"], rtol=1e-5, atol=1e-5,
                                       err_msg=what)
    assert alone[f"{mode} losses"][-1] < 0.99 * alone[f"{mode} losses"][0]
    # What every process has whole is bit for bit the same on all.
    np.testing.assert_array_equal(both[0][f"{mode} output"], both[1][f"{mode} output"])


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_the_adapter_is_an_ordinary_one(results, mode):
    _, _, folder = results
    one, two = (load_file(folder / count / f"{mode}_adapter" / "adapter_model.safetensors") for count in "12")
    assert one.keys() == two.keys() and len(one) == 24
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_needs_the_whole_is_refused(results):
    for of_rank in results[1]:
        said = list(of_rank["graph said"])
        assert len(said) == 10
        for text, words in zip(said, ("DoRA needs the norm", "lora_dropout would drop", "'pissa' needs the whole",
                                      "B has no bias", "adapts nn.Dense", "split before you", "outputs are 5",
                                      "'nothing'", "both column and row name it", "max_norm does not go")):
            assert words in text


def test_one_process_cannot_split():
    net = nn.SequentialCell(nn.Dense(4, 4))
    with pytest.raises(RuntimeError, match="msrun"):
        mp.split_linear(net, ["0"], ["0"])
