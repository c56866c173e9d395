"""Bases in few bits: the numbers against float64 numpy from the papers, and what a net does with them."""
from __future__ import annotations

import copy
import math
import statistics

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn
from nets import gradients_of, inputs, numbers, pynative, unchanged

import mindpet_lite as mp
from mindpet_lite.delta.hosts import Quantised
from mindpet_lite.formats import quantised

KINDS = ("int8", "q8_0", "nf4")
# By the appendix of 2110.02861 and QLoRA's NF4: what rounding may change of a number, over the largest of its block.
RNG = np.random.default_rng(5)


def normal_float_4() -> np.ndarray:
    """Return NF4 as bitsandbytes' authors made it: quantiles of a normal distribution, 8 above and 7 below zero."""
    normal, offset = statistics.NormalDist(), 0.9677083
    above = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    return np.sort(np.array([*above, 0.0, *below]) / max(above))


def dynamic_8_bit() -> np.ndarray:
    """Return the dynamic type by its bits: sign, zeros up to the first one, then a linear fraction."""
    found = {0.0, 1.0}
    for zeros in range(7):
        count = 2 ** (6 - zeros)
        found |= {sign * 10.0 ** -zeros * (0.1 + 0.9 * (index + 0.5) / count) for index in range(count)
                  for sign in (1, -1)}
    return np.array(sorted(found))


def reference(kind: str, weight: np.ndarray) -> np.ndarray:
    """Return in float64 what a weight becomes, number by number where that is how the paper has it."""
    if kind == "int8":
        scale = np.abs(weight).max(1, keepdims=True) / 127
        return np.rint(weight / scale) * scale
    if kind == "q8_0":
        blocks = weight.reshape(len(weight), -1, 32)
        scale = (np.abs(blocks).max(2, keepdims=True) / 127).astype(np.float16).astype(np.float64)
        return (np.rint(blocks / scale) * scale).reshape(weight.shape)
    flat = np.concatenate([weight.reshape(-1), np.zeros(-weight.size % 64)]).reshape(-1, 64)
    largest, values, table = np.abs(flat).max(1), normal_float_4(), dynamic_8_bit()
    codes = np.abs(flat[..., None] / largest[:, None, None] - values).argmin(-1)
    mean, scales = largest.mean(), largest.copy()
    for first in range(0, len(largest), 256):
        part = largest[first:first + 256] - mean
        top = np.abs(part).max() or 1
        scales[first:first + 256] = table[np.abs(part[:, None] / top - table).argmin(-1)] * top + mean
    return (values[codes] * scales[:, None]).reshape(-1)[:weight.size].reshape(weight.shape)


def test_the_tables_are_those_of_the_papers():
    np.testing.assert_allclose(quantised.NF4, normal_float_4(), atol=1e-6)
    assert len(quantised.DYNAMIC) == 256
    np.testing.assert_allclose(quantised.DYNAMIC, dynamic_8_bit(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 32), (300, 64), (5, 96), (40, 480)])
def test_numbers_are_those_of_the_reference(kind, shape):
    weight = RNG.standard_normal(shape) * 0.02
    tensors = quantised.quantise(kind, weight.astype(np.float32))
    parts = quantised.parts_of(kind, shape)
    assert {name: (str(item.dtype), item.shape) for name, item in tensors.items()} == dict(parts)
    found, wanted = quantised.dequantise(kind, tensors, shape), reference(kind, weight.astype(np.float32).astype(float))
    # A number on the border of two codes may fall on either side in float32: one in thousands, by one step.
    other = np.abs(found - wanted) > 1e-6 * np.abs(weight).max()
    assert other.mean() < 1e-3
    error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    assert error < {"int8": 0.02, "q8_0": 0.01, "nf4": 0.12}[kind]
    np.testing.assert_allclose(tensors["weight_error"], error, rtol=1e-4)
    again = quantised.quantise(kind, found)
    if kind != "nf4":
        # NF4's scales are rounded once more.
        assert np.array_equal(again["weight"], tensors["weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_blocks_of_zeros_and_one_number_stay(kind):
    weight = np.zeros((4, 64), np.float32)
    assert not quantised.dequantise(kind, quantised.quantise(kind, weight), weight.shape).any()
    weight[2, 3] = -5
    found = quantised.dequantise(kind, quantised.quantise(kind, weight), weight.shape)
    assert np.array_equal(found != 0, weight != 0) and abs(found[2, 3] + 5) < 0.05


def test_large_weights_are_computed_in_parts(monkeypatch):
    weight = RNG.standard_normal((130, 96)).astype(np.float32)
    for kind in KINDS:
        whole = quantised.quantise(kind, weight)
        with monkeypatch.context() as patch:
            patch.setattr(quantised, "_AT_ONCE", 64 * 96)
            parted = quantised.quantise(kind, weight)
            np.testing.assert_array_equal(quantised.dequantise(kind, parted, weight.shape),
                                          quantised.dequantise(kind, whole, weight.shape))
        assert all(np.array_equal(parted[name], whole[name]) for name in whole if name != "weight_error")


class Net(nn.Cell):
    """Two layers of both kinds, a bias in one, an activation in the other."""

    def __init__(self) -> None:
        super().__init__()
        # Of the activations on CPU the sigmoid is exact to float32.
        self.up = nn.Dense(64, 96, activation="sigmoid")
        self.down = mint.nn.Linear(96, 33, bias=False)

    def construct(self, x):
        return self.down(self.up(x))


def filled(kind: str = "", seed: int = 0) -> Net:
    net, rng = Net(), np.random.default_rng(seed)
    for item in net.get_parameters():
        item.set_data(Tensor((rng.standard_normal(item.shape) * 0.2).astype(np.float32)))
    return mp.quantize_base(net, kind) if kind else net


def in_float64(net: Net, x: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the output and the gradient of sum(y · slope) by x."""
    first, second = (cell.weight_numbers().astype(float) for cell in (net.up, net.down))
    middle = 1 / (1 + np.exp(-x @ first.T - numbers(net.up.bias)))
    return middle @ second.T, ((slope @ second) * middle * (1 - middle)) @ first


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_computes_with_the_numbers_and_their_gradient(kind, mode, tmp_path):
    plain, x = filled(), inputs(2, 3, 64)
    names = [item.name for item in plain.get_parameters()]
    net, weights = filled(kind), np.random.default_rng(1).standard_normal((2, 3, 33))
    assert isinstance(net.up, Quantised) and isinstance(net.down, Quantised)
    assert [item.name for item in net.get_parameters() if item.name in names] == names
    assert [item.name for item in net.trainable_params()] == ["up.bias"]
    for item in net.get_parameters():
        item.requires_grad = True
    assert [item.name for item in net.trainable_params()] == ["up.bias"], "codes never train"

    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"]))
    y, by_x, found = gradients_of(net, net.trainable_params(), x, weights)
    wanted, slope = in_float64(net, numbers(x), weights)
    np.testing.assert_allclose(y.asnumpy(), wanted, atol=2e-5)
    np.testing.assert_allclose(by_x.asnumpy(), slope, atol=5e-5)
    assert any(item.asnumpy().any() for item in found)
    # B is zero, so A has no gradient yet; both do after.
    for item in net.trainable_params():
        item.set_data(Tensor(np.full(item.shape, 0.1, np.float32)))
    full = net(x).asnumpy()

    with pytest.warns(UserWarning, match=r"1 quantised layers plain.*rounding changed \d+\.\d+% of a weight"):
        mp.merge(net)
    assert type(net.up) is nn.Dense and isinstance(net.down, Quantised) and net.up.weight.dtype == ms.float32
    np.testing.assert_allclose(net(x).asnumpy(), full, atol=2e-5)
    mp.unmerge(net)
    assert np.array_equal(net(x).asnumpy(), full)

    # MindSpore's own checkpoints, into a net that was quantised with other numbers, and with none.
    ms.save_checkpoint(net, str(tmp_path / "net.ckpt"))
    with nn.utils.no_init_parameters():
        empty = Net()
    for other in (filled(kind, seed=9), mp.quantize_base(empty, kind)):
        mp.get_pet_model(other, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"]))
        missing, unused = ms.load_param_into_net(other, ms.load_checkpoint(str(tmp_path / "net.ckpt")))
        assert not missing and not unused
        assert np.array_equal(other(x).asnumpy(), full)
    mp.save_adapter(net, tmp_path / "adapter")
    assert np.array_equal(mp.load_adapter(filled(kind), tmp_path / "adapter")(x).asnumpy(), full)


@pytest.mark.parametrize("kind", KINDS)
def test_types_are_those_of_the_plain_layers(kind, mode):
    x = inputs(3, 64)
    for dtype, to in ((ms.float16, None), (ms.float32, ms.float16)):
        plain = nn.SequentialCell(nn.Dense(64, 32, dtype=dtype, activation="relu"))
        net = copy.deepcopy(plain)
        if to is not None:
            plain, net = plain.to_float(to), net.to_float(to)
        mp.quantize_base(net, kind)
        given = x.astype(dtype)
        y, wanted = net(given), plain(given)
        assert y.dtype == wanted.dtype == ms.float16
        bound = {"int8": 0.03, "q8_0": 0.03, "nf4": 0.3}[kind]
        assert np.abs(numbers(y) - numbers(wanted)).max() < bound
        back = mp.dequantize_base(net)
        assert type(back[0]) is nn.Dense and back[0].weight.dtype == dtype
        assert back(given).dtype == ms.float16
        np.testing.assert_allclose(numbers(back(given)), numbers(y), atol=1e-2)


def test_dequantising_gives_plain_layers_with_the_numbers_of_the_codes(pynative_mode):
    net, x = filled("nf4"), inputs(2, 64)
    y = net(x).asnumpy()
    values = {"up": net.up.weight_numbers(), "down": net.down.weight_numbers()}
    mp.dequantize_base(net, ["up"])
    assert type(net.up) is nn.Dense and isinstance(net.down, Quantised)
    with pytest.raises(ValueError, match="up: a Dense is not quantised"):
        mp.dequantize_base(net, ["up"])
    mp.dequantize_base(net)
    assert type(net.down) is mint.nn.Linear
    assert all(np.array_equal(getattr(net, path).weight.asnumpy(), value) for path, value in values.items())
    assert [item.name for item in net.get_parameters()] == [item.name for item in Net().get_parameters()]
    np.testing.assert_allclose(net(x).asnumpy(), y, atol=1e-5)
    with pytest.raises(ValueError, match="no layer of this net is quantised"):
        mp.dequantize_base(net)


def test_summary_says_what_is_quantised(capsys):
    net = mp.get_pet_model(filled("nf4"), mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up", "down"]))
    text = str(mp.summary(net))
    assert "quantised layers: 2 nf4: 0.0 MB of weights, 0.13" in text and "rounding changed" in text
    assert text in capsys.readouterr().out
    assert "quantised" not in str(mp.summary(mp.get_pet_model(filled(), mp.LoraConfig(
        lora_rank=2, lora_alpha=4, target_modules=["up"]))))


def test_dora_and_several_adapters_stand_on_quantised_layers(mode):
    x, net = inputs(2, 64), filled("int8")
    before = net(x).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"], use_dora=True))
    np.testing.assert_allclose(net(x).asnumpy(), before, atol=1e-6)
    net = filled("nf4")
    before = net(x).asnumpy()
    for name in ("one", "two"):
        mp.add_adapter(net, name, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"]))
    mp.set_adapter(net, "two")
    assert np.array_equal(net(x).asnumpy(), before)


def test_bitfit_trains_the_bias_of_a_quantised_layer(pynative_mode):
    net = mp.get_pet_model(filled("int8"), mp.BitFitConfig())
    assert [item.name for item in net.trainable_params()] == ["up.bias"]


class Tied(nn.Cell):
    """An embedding and a head with one weight, and a layer that holds another's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Dense(64, 64), nn.Dense(64, 64), nn.LayerNorm((64,))
        self.two.weight = self.one.weight

    def construct(self, x):
        return self.two(self.one(x))


def test_what_cannot_be_quantised_is_refused_in_a_sentence_and_nothing_changes(pynative_mode):
    def refused(net, message, kind="nf4", targets="all-linear", error=ValueError):
        with unchanged(net), pytest.raises(error, match=message):
            mp.quantize_base(net, kind, targets)

    refused(Net(), r"kind must be one of int8, q8_0, nf4, but got 'nf'\. Did you mean 'nf4'\?", "nf")
    refused(Net(), "kind must be one of", 4, error=TypeError)
    refused(Net(), "targets must be", targets=3, error=TypeError)
    refused(Net(), "targets entry 'ups' hits nothing.*Did you mean 'up'", targets=["ups"])
    refused(Net(), "targets 'x.*' hits nothing", targets="x.*")
    refused(filled("int8"), "up: it is int8 already", targets=["up"])
    refused(mp.get_pet_model(Net(), mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"])),
            "up: a LoRADense has an adapter on it", targets=["up"])
    refused(mp.get_pet_model(Net(), mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"],
                                                  modules_to_save=["down"])), "down: down.weight trains",
            targets=["down"])
    refused(Tied(), "one: its weight is that of two.weight too", targets=["one"])
    refused(Tied(), "norm", targets=["norm"])
    refused(nn.Dense(64, 64), "put it into a cell", targets=".*")
    net = Net()
    net.down.weight.set_data(Tensor(np.full((33, 96), np.nan, np.float32)))
    refused(net, "down: down.weight holds NaN")
    net = Net()
    net.up.weight.requires_grad = False
    refused(net, "down: down.weight trains", targets=["down"])
    odd = nn.SequentialCell(nn.Dense(50, 4))
    refused(odd, "0: q8_0 has a scale for each 32 inputs, into which 50 cannot be cut", "q8_0")
    large = nn.SequentialCell(nn.Dense(64, 4))
    large[0].weight.set_data(Tensor(np.full((4, 64), 3e38, np.float32)))
    refused(large, "0: its numbers are too large for the scales of q8_0", "q8_0")
    net = filled("int8")
    with unchanged(net), pytest.raises(ValueError, match="takes a part out of the weight, which a quantised"):
        mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"],
                                            init_lora_weights="pissa"))
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"]))
    with unchanged(net), pytest.raises(ValueError, match="up: a LowRankInt8Dense has an adapter on it: merge"):
        mp.dequantize_base(net)


def test_a_refused_merge_keeps_nothing_of_it(pynative_mode):
    net = mp.get_pet_model(filled("int8"), mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["up"]))
    net.up.mindpet_delta_lora_b.set_data(Tensor(np.full((96, 2), np.nan, np.float32)))
    with unchanged(net), pytest.raises(ValueError, match="up"):
        mp.merge(net)
    assert net.up._full == ()


def test_training_on_a_quantised_base_moves_the_adapter_alone(mode):
    net = mp.get_pet_model(filled("nf4"), mp.LoraConfig(lora_rank=4, lora_alpha=8, target_modules="all-linear"))
    before = {item.name: item.asnumpy().copy() for item in net.get_parameters()}
    x, target = inputs(8, 64), inputs(8, 33, seed=3)
    optimizer = nn.Adam(net.trainable_params(), 1e-2)
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer).set_train()
    losses = [float(step(x, target).asnumpy()) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0] and math.isfinite(losses[-1])
    moved = {item.name for item in net.get_parameters() if not np.array_equal(item.asnumpy(), before[item.name])}
    assert moved == {item.name for item in net.trainable_params()}
    with pynative():
        assert np.isfinite(net(x).asnumpy()).all()
