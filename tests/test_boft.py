"""BOFT against float64 numpy with whole matrices, and what only it does."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import inputs, numbers
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.delta.parts import put


class Net(nn.Cell):
    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return self.layer(x)


def adapted(layer: nn.Cell, **settings) -> Net:
    """Return a net with BOFT on its only layer, moved from its start."""
    net = mp.get_pet_model(Net(layer), mp.BOFTConfig(target_modules=["layer"], **settings))
    rng = np.random.default_rng(0)
    for item in net.layer.delta_parameters().values():
        put(item, Tensor((item.asnumpy() + 0.3 * rng.standard_normal(item.shape)).astype(np.float32)))
    # MindSpore compiles again for training only where a net was told before that it does not train.
    return net.set_train(False)


def permutation(width: int, size: int, stage: int) -> np.ndarray:
    """Return P of a stage: in runs of 2^stage blocks the even half blocks come first."""
    order, half, run = [], size // 2, size * 2 ** stage
    for start in range(0, width, run):
        starts = list(range(start, start + run, half))
        order += [place + item for place in starts[::2] + starts[1::2] for item in range(half)]
    found = np.zeros((width, width))
    found[np.arange(width), order] = 1
    return found


def rotation(net: Net, strength: float = 1.0) -> np.ndarray:
    """Return R = M(m) ... M(1) in float64, each of blocks I + t (Rij - I) between permutations."""
    free = numbers(net.layer.mindpet_delta_boft_r)
    factors, blocks, size, _ = free.shape
    found = np.eye(blocks * size)
    for stage in range(factors):
        matrix = np.zeros(found.shape)
        for index in range(blocks):
            q = (free[stage, index] - free[stage, index].T) / 2
            turn = (np.eye(size) - q) @ np.linalg.inv(np.eye(size) + q)
            part = slice(index * size, (index + 1) * size)
            matrix[part, part] = np.eye(size) + strength * (turn - np.eye(size))
        p = permutation(len(found), size, stage) if stage else np.eye(len(found))
        found = p @ matrix @ p.T @ found
    return found


@pytest.mark.parametrize("settings", [
    {"boft_block_size": 3}, {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 3}])
def test_inputs_are_turned_and_outputs_scaled(settings, mode):
    width = 24
    net, x = adapted(nn.Dense(width, 3), **settings), inputs(5, width)
    weight, bias = numbers(net.layer.weight), numbers(net.layer.bias)
    factor = numbers(net.layer.mindpet_delta_boft_s)[:, 0]
    for strength in (1.0, 0.25):
        mp.set_lora_scale(net, strength)
        wanted = numbers(x) @ rotation(net, strength) @ weight.T * (1 + strength * (factor - 1)) + bias
        np.testing.assert_allclose(net(x).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


def test_factors_mix_what_one_keeps_apart():
    one, three = (rotation(adapted(nn.Dense(8, 3), boft_block_size=2, boft_n_butterfly_factor=factors))
                  for factors in (1, 3))
    assert np.count_nonzero(one) == 16 and np.count_nonzero(np.abs(three) > 1e-9) == 64
    np.testing.assert_allclose(three @ three.T, np.eye(8), atol=1e-12)


def test_a_kernel_is_turned_as_one_row_for_each_output(mode):
    layer = nn.Conv2d(4, 3, (3, 2), pad_mode="valid", has_bias=True)
    net, x = adapted(layer, boft_block_size=6, boft_n_butterfly_factor=2), inputs(2, 4, 5, 4)
    assert net.layer.mindpet_delta_boft_s.shape == (1, 3)
    rows = numbers(layer.weight).reshape(3, 24) @ rotation(net).T * numbers(net.layer.mindpet_delta_boft_s).T
    plain = nn.Conv2d(4, 3, (3, 2), pad_mode="valid", has_bias=True)
    plain.weight.set_data(Tensor(rows.reshape(3, 4, 3, 2), ms.float32))
    plain.bias.set_data(layer.bias)
    np.testing.assert_allclose(net(x).asnumpy(), plain(x).asnumpy(), rtol=1e-5, atol=1e-5)


def test_a_file_tells_its_factors_itself():
    # PEFT without its CUDA kernel trains one factor and writes the number that it was asked for.
    net = adapted(nn.Dense(8, 3), boft_block_size=2)
    mp.save_adapter(net, "adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "boft_n_butterfly_factor": 2}))
    again = mp.load_adapter(Net(nn.Dense(8, 3)), "adapter")
    assert again.layer.settings()["boft_n_butterfly_factor"] == 1
    mp.save_adapter(again, "again")
    assert json.loads(Path("again/adapter_config.json").read_text()) == json.loads(path.read_text())
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if not key.endswith("boft_R")},
              "adapter/adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing: layer.mindpet_delta_boft_r"):
        mp.load_adapter(Net(nn.Dense(8, 3)), "adapter")


def test_dropout_makes_blocks_i_in_training_alone(mode):
    net = adapted(nn.Dense(16, 16, has_bias=False), boft_block_size=4, boft_dropout=0.5)
    put(net.layer.weight, Tensor(np.eye(16), ms.float32))
    put(net.layer.mindpet_delta_boft_s, Tensor(np.ones((16, 1)), ms.float32))
    x = inputs(3, 16)
    whole, same = numbers(x) @ rotation(net), x.asnumpy()
    np.testing.assert_allclose(net(x).asnumpy(), whole, rtol=1e-5, atol=1e-6)
    net.set_train()
    kept = []
    for _ in range(30):
        y = net(x).asnumpy()
        for block in range(4):
            part = slice(4 * block, 4 * block + 4)
            kept.append(np.allclose(y[:, part], whole[:, part], rtol=1e-5, atol=1e-6))
            assert kept[-1] or np.array_equal(y[:, part], same[:, part])
    assert 0.3 < np.mean(kept) < 0.7
    assert not hasattr(adapted(nn.Dense(8, 3)).layer, "block_dropout")
    # Of two factors each has half of it.
    two = adapted(nn.Dense(16, 16), boft_block_size=4, boft_dropout=0.5, boft_n_butterfly_factor=2)
    assert two.layer.block_dropout.p == 0.25


@pytest.mark.parametrize(("bias", "expected"), [("none", set()), ("boft_only", {"0.bias"}),
                                                ("all", {"0.bias", "1.bias"})])
def test_biases_that_train_beside(bias, expected):
    net = nn.SequentialCell(nn.Dense(8, 4), nn.Dense(4, 2))
    mp.get_pet_model(net, mp.BOFTConfig(target_modules=["0"], bias=bias))
    assert {path for path, item in net.parameters_and_names()
            if item.requires_grad and "delta" not in path} == expected


def test_a_random_start():
    np.random.seed(0)
    net = mp.get_pet_model(Net(nn.Dense(64, 64)), mp.BOFTConfig(target_modules=["layer"], init_weights=False))
    free, factor = (numbers(item) for item in net.layer.delta_parameters().values())
    assert 0.09 < free.std() < 0.11 and abs(free.mean()) < 0.01
    assert 0.07 < factor.std() < 0.13 and abs(factor.mean() - 1) < 0.05


@pytest.mark.parametrize(("layer", "settings", "message"), [
    (lambda: nn.Dense(6, 2), {}, "boft_block_size must divide the layer's 6 inputs"),
    (lambda: nn.Dense(6, 2), {"boft_block_size": 0, "boft_block_num": 4}, "boft_block_num must divide"),
    (lambda: nn.Dense(12, 2), {"boft_n_butterfly_factor": 2}, "multiple of 2, but .* 3 blocks of 4"),
    (lambda: nn.Dense(12, 2), {"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "even size"),
    (lambda: nn.Conv2d(4, 4, 3, group=2), {}, "2 groups")])
def test_layers_that_cannot_be_cut_so_are_refused(layer, settings, message):
    with pytest.raises(ValueError, match=message):
        mp.get_pet_model(Net(layer()), mp.BOFTConfig(target_modules=["layer"], **settings))


@pytest.mark.parametrize(("settings", "message"), [
    ({"boft_block_num": 4}, "give boft_block_size or"), ({"boft_block_size": 0}, "give boft_block_size or"),
    ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor must be"), ({"boft_block_size": True}, "must be"),
    ({"boft_dropout": 1.5}, "boft_dropout must be"), ({"bias": "oft_only"}, "bias must be one of"),
    ({"init_weights": 1}, "init_weights must be")])
def test_wrong_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mp.BOFTConfig(target_modules=["layer"], **settings)
