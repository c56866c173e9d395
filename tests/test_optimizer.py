"""An optimizer that was made too early is said to be so before the first step."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.dataset import NumpySlicesDataset
from mindspore.experimental import optim
from mindspore.train import Model
from nets import config

import mindpet_lite as mp
from mindpet_lite.graph import freeze_delta


def build() -> nn.Cell:
    return nn.SequentialCell(nn.Dense(4, 6), nn.ReLU(), nn.Dense(6, 2))


def adapted(**fields) -> nn.Cell:
    return mp.get_pet_model(build(), config(["0"], **fields))


def train(net: nn.Cell, callback, optimizer=None, network=None) -> None:
    x = np.ones((4, 4), np.float32)
    data = NumpySlicesDataset({"x": x, "y": x[:, :2]}, shuffle=False).batch(2)
    model = Model(network) if network else Model(net, nn.MSELoss(), optimizer)
    model.train(1, data, callbacks=[callback], dataset_sink_mode=False)


def callbacks(net: nn.Cell, folder) -> tuple:
    return mp.HealthCallback(network=net), mp.TrainableParamsCheckPoint(folder)


def refused(net: nn.Cell, optimizer: nn.Cell, folder, words: str) -> None:
    """Expect the same of check_optimizer and of both callbacks, with the optimizer in a step of its own too."""
    values = [item.asnumpy().copy() for item in net.get_parameters()]
    with pytest.raises(ValueError, match=words):
        mp.check_optimizer(net, optimizer)
    for callback in callbacks(net, folder):
        with pytest.raises(ValueError, match=words):
            train(net, callback, optimizer)
        with pytest.raises(ValueError, match=words):
            train(net, callback, network=mp.GradientAccumulation(nn.WithLossCell(net, nn.MSELoss()), optimizer, 2))
    assert all(np.array_equal(new.asnumpy(), old) for new, old in zip(net.get_parameters(), values))


def test_made_before_the_net_was_adapted(tmp_path):
    net = build()
    optimizer = nn.Adam(net.trainable_params(), 0.01)
    mp.get_pet_model(net, config(["0"]))
    refused(net, optimizer, tmp_path, r"it lacks \S*0\.mindpet_delta_lora_a, \S*0\.mindpet_delta_lora_b of the "
                                      r"adapter, .*made before the net was adapted[\s\S]*it holds \S*0\.weight, "
                                      r"\S*0\.bias, \S*2\.weight and 1 more, which are frozen[\s\S]*after")


def test_made_between_adapting_and_freezing(tmp_path):
    net = adapted(freeze_exclude=["2.*"])
    optimizer = nn.Adam(net.trainable_params(), 0.01)
    mp.freeze_delta(net, "lora")
    refused(net, optimizer, tmp_path, r"fit the net:\n  it holds \S*2\.weight, \S*2\.bias, which are frozen")


def test_made_from_a_part_of_the_adapter_or_without_its_head(tmp_path):
    net = adapted(modules_to_save=["2"])
    refused(net, nn.Adam(net.trainable_params()[:3], 0.01), tmp_path,
            r"it lacks \S+ of the adapter, which would stay as it is")
    mp.freeze_modules(net, include=["*lora_b"])
    rest = [item for item in net.trainable_params()]
    mp.check_optimizer(net, nn.Adam(rest, 0.01))


class Two(nn.Cell):
    """A training step with an optimizer for each half."""

    def __init__(self, net: nn.Cell, halves) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.loss = net, nn.MSELoss()
        self.one, self.two = (nn.SGD(half, 0.01) for half in halves)
        self.gradients = ms.value_and_grad(self.value, None, self.one.parameters + self.two.parameters)

    def value(self, x, y):
        return self.loss(self.net(x), y)

    def construct(self, x, y):
        value, gradients = self.gradients(x, y)
        self.one(gradients[:1])
        self.two(gradients[1:])
        return value


def test_what_is_right_stays_right(tmp_path, pynative_mode):
    net = adapted()
    mp.check_optimizer(net, nn.AdamWeightDecay(mp.lora_plus_groups(net, 0.01, 4)))
    mp.check_optimizer(net, optim.SGD(net.trainable_params(), 0.01))
    for callback in callbacks(net, tmp_path):
        train(net, callback, nn.AdamWeightDecay(mp.lora_plus_groups(net, 0.01, 4)))
        train(net, callback, network=Two(net, [net.trainable_params()[:1], net.trainable_params()[1:]]))
    plain = build()
    mp.freeze_modules(plain, include=["0.*"])
    train(plain, mp.TrainableParamsCheckPoint(tmp_path), nn.Adam(plain.trainable_params(), 0.01))
    mp.check_optimizer(plain, nn.Adam(plain.trainable_params(), 0.01))


def test_a_plain_net_that_was_frozen_too_late(tmp_path):
    net = build()
    optimizer = nn.Adam(net.trainable_params(), 0.01)
    mp.freeze_modules(net, include=["0.*"])
    with pytest.raises(ValueError, match=r"it holds 0\.weight, 0\.bias, which are frozen"):
        train(net, mp.TrainableParamsCheckPoint(tmp_path), optimizer)


def test_wrong_types():
    with pytest.raises(TypeError, match="optimizer must be an optimizer such as nn.Adam, but got list"):
        mp.check_optimizer(adapted(), [])
    with pytest.raises(TypeError, match="net must be"):
        mp.check_optimizer([], nn.Adam(build().trainable_params()))


def test_made_before_more_was_set_to_train():
    net = nn.SequentialCell(nn.Dense(4, 4), nn.ReLU(), nn.Dense(4, 2))
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["0"]))
    optimizer = nn.Adam(net.trainable_params(), 1e-2)
    mp.check_optimizer(net, optimizer)
    freeze_delta(net, "lora", exclude=["*2.weight"])
    with pytest.raises(ValueError, match="it lacks 2.weight of the adapter"):
        mp.check_optimizer(net, optimizer)
    mp.check_optimizer(net, nn.Adam(net.trainable_params(), 1e-2))


def test_a_training_step_has_parameters_of_its_own():
    net = nn.SequentialCell(nn.Dense(4, 4), nn.ReLU(), nn.Dense(4, 2))
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["0"]))
    optimizer = nn.Adam(net.trainable_params(), 1e-2)
    step = nn.TrainOneStepWithLossScaleCell(nn.WithLossCell(net, nn.MSELoss()), optimizer,
                                            nn.DynamicLossScaleUpdateCell(1024.0, 2, 100))
    mp.check_optimizer(step, optimizer)
    with pytest.raises(ValueError, match="it lacks .*0.mindpet_delta_lora_b of the adapter"):
        mp.check_optimizer(step, nn.Adam(net.trainable_params()[:1], 1e-2))
