"""LoRA+ groups: which parameter has which rate, in the groups and in the step that an optimizer makes."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from nets import Attention, config

import mindpet_lite as mp


class Mixed(nn.Cell):
    """A table, a linear layer and a norm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.dense = nn.Dense(4, 3)
        self.norm = nn.LayerNorm((3,))

    def construct(self, ids):
        return self.norm(self.dense(self.table(ids)))


def rates(net, optimizer) -> dict[str, float]:
    """Return the rate that an optimizer holds for each Parameter, by name."""
    return {item.name: float(optimizer.get_lr_parameter(item).asnumpy()) for item in net.trainable_params()}


def test_b_and_its_bias_learn_faster_and_all_else_does_not():
    net = mp.get_pet_model(Mixed(), config(["table"], freeze_exclude=["norm.*"]))
    net.dense = mp.LoRADense.from_dense(net.dense, 2, 4, lora_bias=True)
    net.norm.gamma.name = "norm.gamma"
    mp.freeze_delta(net, "lora", exclude=["*norm.*"])
    optimizer = nn.AdamWeightDecay(mp.lora_plus_groups(net, 1e-3, 16))
    slow = {name: rate for name, rate in rates(net, optimizer).items() if np.isclose(rate, 1e-3)}
    fast = {name: rate for name, rate in rates(net, optimizer).items() if np.isclose(rate, 16e-3)}
    assert {name.rpartition(".")[2] for name in fast} == {
        "mindpet_delta_lora_b", "mindpet_delta_lora_b_bias", "mindpet_delta_lora_embedding_b"}
    assert {name.rpartition(".")[2] for name in slow} == {
        "mindpet_delta_lora_a", "mindpet_delta_lora_embedding_a", "gamma", "beta"}


def test_doras_magnitude_is_not_b():
    net = mp.get_pet_model(Attention(), config(["to_q"], use_dora=True))
    slow, fast = mp.lora_plus_groups(net, 1.0, 4)
    assert [item.name.rpartition("_")[2] for item in slow["params"]] == ["a", "magnitude"]
    assert fast == {"params": [net.to_q.mindpet_delta_lora_b], "lr": 4.0}


def test_which_is_b_is_the_deltas_word_not_the_names():
    net = mp.get_pet_model(Attention(), config(["to_q"]))
    net.to_q.mindpet_delta_lora_a.name, net.to_q.mindpet_delta_lora_b.name = "lora_b", "lora_a"
    slow, fast = mp.lora_plus_groups(net, 1.0, 4)
    assert slow["params"] == [net.to_q.mindpet_delta_lora_a] and fast["params"] == [net.to_q.mindpet_delta_lora_b]


def test_the_step_is_the_papers(mode):
    """With signed gradients (Adam's first step) A moves by η and B by λη."""
    net = mp.get_pet_model(Attention(), config(["to_q", "blocks.0"]))
    before = {item.name: item.asnumpy().astype(np.float64) for item in net.trainable_params()}
    optimizer = nn.SGD(mp.lora_plus_groups(net, 0.01, 8))
    rng = np.random.default_rng(0)
    gradients = {item.name: rng.standard_normal(item.shape).astype(np.float32) for item in net.trainable_params()}
    optimizer(tuple(Tensor(gradients[item.name]) for item in optimizer.parameters))
    for item in net.trainable_params():
        rate = 0.08 if item.name.endswith("b") else 0.01
        np.testing.assert_allclose(item.asnumpy(), before[item.name] - rate * gradients[item.name].astype(np.float64),
                                   rtol=1e-6, atol=1e-7)


def test_weight_decay_is_what_it_is_without_groups():
    def decays(made) -> dict[str, float]:
        parameters = made.parameters
        values = [0.1] * len(parameters) if not made.is_group else [float(one.asnumpy()) for one in made.weight_decay]
        return {item.name: value if flag else 0.0 for item, value, flag in zip(parameters, values, made.decay_flags)}

    net = mp.get_pet_model(Attention(), config(["to_q"], freeze_exclude=["norm.*", "to_k.bias"]))
    plain = nn.AdamWeightDecay(net.trainable_params(), weight_decay=0.1)
    grouped = nn.AdamWeightDecay(mp.lora_plus_groups(net, 1e-3, 2), weight_decay=0.1)
    assert decays(plain) == pytest.approx(decays(grouped))
    assert decays(grouped)["norm.gamma"] == 0 and decays(grouped)["to_k.bias"] == pytest.approx(0.1)


@pytest.mark.parametrize("lr", [[0.1, 0.2, 0.4], (0.1, 0.2, 0.4), np.array([0.1, 0.2, 0.4]), Tensor([0.1, 0.2, 0.4])],
                         ids=["list", "tuple", "array", "tensor"])
def test_a_rate_for_each_step(lr):
    net = mp.get_pet_model(Attention(), config(["to_q"]))
    slow, fast = mp.lora_plus_groups(net, lr, 10)
    np.testing.assert_allclose(slow["lr"], [0.1, 0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose(fast["lr"], [1, 2, 4], rtol=1e-6)
    optimizer = nn.SGD([slow, fast])
    assert [float(one.asnumpy()) for one in optimizer.get_lr()] == pytest.approx([0.1, 1])


def test_a_schedule_is_scaled(mode):
    net = mp.get_pet_model(Attention(), config(["to_q"]))
    schedule = nn.ExponentialDecayLR(0.1, 0.5, 1)
    optimizer = nn.SGD(mp.lora_plus_groups(net, schedule, 10))
    start = [item.asnumpy().copy() for item in optimizer.parameters]
    ones = tuple(Tensor(np.ones(item.shape, np.float32)) for item in optimizer.parameters)
    optimizer(ones)
    optimizer(ones)
    for item, before, factor in zip(optimizer.parameters, start, (1, 10)):
        np.testing.assert_allclose(item.asnumpy(), before - factor * (0.1 + 0.05), rtol=1e-5, atol=1e-6)


def frozen(names):
    net = mp.get_pet_model(Attention(), config(["to_q"]))
    for item in net.trainable_params():
        item.requires_grad = not item.name.endswith(names)
    return net


@pytest.mark.parametrize(("net", "words"), [
    (lambda: Attention(), "no adapted layer"),
    (lambda: frozen(("_a", "_b")), "Nothing in the net trains"),
    (lambda: frozen(("_b",)), "Every B in the net is frozen"),
    (lambda: mp.get_pet_model(Attention(), mp.BitFitConfig()), "method is bitfit")])
def test_nets_without_a_b_to_train(net, words):
    with pytest.raises(ValueError, match=words):
        mp.lora_plus_groups(net(), 1e-3, 16)


def test_all_but_b_may_be_frozen():
    net = frozen(("_a",))
    assert mp.lora_plus_groups(net, 1e-3, 16) == [{"params": [net.to_q.mindpet_delta_lora_b], "lr": 16e-3}]


@pytest.mark.parametrize(("lr", "ratio", "error"), [
    (1e-3, 0, ValueError), (1e-3, float("nan"), ValueError), (1e-3, "16", TypeError), (1e-3, True, TypeError),
    (0, 16, ValueError), (-1.0, 16, ValueError), ("1e-3", 16, TypeError), (None, 16, TypeError), ([], 16, ValueError),
    ([0.1, -0.1], 16, ValueError), ([0.1, "x"], 16, TypeError), (float("inf"), 16, ValueError)])
def test_wrong_rates(lr, ratio, error):
    with pytest.raises(error, match="lr|ratio"):
        mp.lora_plus_groups(mp.get_pet_model(Attention(), config(["to_q"])), lr, ratio)


def test_no_cell():
    with pytest.raises(TypeError, match="must be a mindspore.nn.Cell"):
        mp.lora_plus_groups([Parameter(Tensor(1.0, ms.float32))], 1e-3, 16)
