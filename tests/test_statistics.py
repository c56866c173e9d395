"""Statistics that move in a frozen base: said at injection, and kept still by `freeze_statistics`."""
from __future__ import annotations

import warnings

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, nn, ops
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Model
from nets import config, inputs

import mindpet_lite as mp


class Counting(nn.Cell):
    """A user's own normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.running_mean = Parameter(ops.zeros(6, ms.float32), requires_grad=False)

    def construct(self, x):
        if self.training:
            ops.assign(self.running_mean, 0.5 * self.running_mean + 0.5 * x.mean(axis=0))
        return x - self.running_mean


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Dense(4, 6, weight_init="ones"), nn.BatchNorm1d(6)
        self.own, self.down = Counting(), nn.Dense(6, 2)

    def construct(self, x):
        return self.down(self.own(self.norm(self.up(x))))


def statistics(net: nn.Cell) -> list[np.ndarray]:
    return [item.asnumpy() for item in (net.norm.moving_mean, net.norm.moving_variance, net.own.running_mean)]


def train(net: nn.Cell) -> None:
    x = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    data = NumpySlicesDataset({"x": x, "y": x[:, :2]}, shuffle=False).batch(4)
    Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 0.05)).train(1, data, dataset_sink_mode=False)


@pytest.mark.parametrize("compiled", [False, True], ids=["new", "compiled"])
def test_frozen_statistics_stay_and_the_base_is_the_base(mode, compiled):
    net, x = Net(), inputs(5, 4)
    if compiled:
        with pytest.warns(UserWarning, match="freeze_statistics"):
            mp.get_pet_model(net, config(["up", "down"]))
        base = net.set_train(False)(x).asnumpy()
        net.set_train()(x)
        for item, value in zip((net.norm.moving_mean, net.own.running_mean), (0.0, 0.0)):
            assert item.asnumpy().any()
            item.set_data(ops.full((6,), value, dtype=ms.float32))
        net.norm.moving_variance.set_data(ops.ones(6, ms.float32))
    else:
        base = net(x).asnumpy()
    assert mp.freeze_statistics(net) == ["norm", "own"]
    assert mp.freeze_statistics(net) == ["norm", "own"]
    if not compiled:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mp.get_pet_model(net, config(["up", "down"]))
    before = statistics(net)
    train(net)
    net.set_train()(x)
    for new, old in zip(statistics(net), before):
        np.testing.assert_array_equal(new, old)
    assert net.up.mindpet_delta_lora_b.asnumpy().any()
    assert net.training and not net.norm.training and not net.own.training
    net.set_train(False)
    with mp.adapters_disabled(net):
        np.testing.assert_array_equal(net(x).asnumpy(), base)


def test_what_moves_is_said_at_injection_and_at_loading(tmp_path):
    net = Net()
    words = r"The statistics of norm \(BatchNorm1d\), own \(Counting\) move in training .*modules_to_save"
    with pytest.warns(UserWarning, match=words):
        mp.get_pet_model(net, config(["up"]))
    mp.save_adapter(net, tmp_path / "adapter")
    other = Net()
    with pytest.warns(UserWarning, match=words):
        mp.load_adapter(other, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.load_adapter(other, tmp_path / "adapter")
        still = nn.BatchNorm1d(2, use_batch_statistics=False)
        mp.get_pet_model(nn.SequentialCell(nn.Dense(2, 2), still), config(["0"]))


def test_what_belongs_to_the_adapter_is_left_to_it():
    net = Net()
    with pytest.warns(UserWarning, match=r"The statistics of own \(Counting\) move"):
        mp.get_pet_model(net, config(["up"], modules_to_save=["norm"]))
    assert mp.freeze_statistics(net) == ["own"]
    net.set_train()
    assert net.norm.training and not net.own.training


def test_a_frozen_layer_can_be_recomputed():
    net = nn.SequentialCell(nn.SequentialCell(nn.Dense(4, 6), nn.BatchNorm1d(6)))
    mp.freeze_statistics(net)
    assert mp.net_recompute(net, "0") == ["0"]


def test_errors():
    with pytest.raises(TypeError, match="net must be"):
        mp.freeze_statistics("net")
    with pytest.raises(ValueError, match="nothing to freeze"):
        mp.freeze_statistics(nn.SequentialCell(nn.Dense(2, 2), nn.BatchNorm1d(2, use_batch_statistics=False)))
