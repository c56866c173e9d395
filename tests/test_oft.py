"""OFT against float64 numpy written from the paper, and what only it does."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import gradient_function, inputs, numbers

import mindpet_lite as mp
from mindpet_lite.delta.oft import nearest_divisor
from mindpet_lite.delta.parts import put

EXACT = {"use_cayley_neumann": False}


class Net(nn.Cell):
    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return self.layer(x)


def adapted(layer: nn.Cell, spread: float = 0.3, **settings) -> Net:
    """Return a net with OFT on its only layer, moved from its start."""
    net = mp.get_pet_model(Net(layer), mp.OFTConfig(target_modules=["layer"], **settings))
    rng = np.random.default_rng(0)
    for item in net.layer.delta_parameters().values():
        value = item.asnumpy() + spread * rng.standard_normal(item.shape)
        put(item, Tensor(value.astype(np.float32)).astype(item.dtype))
    # MindSpore compiles again for training only where a net was told before that it does not train.
    return net.set_train(False)


def skew(triangle: np.ndarray) -> np.ndarray:
    """Return Q of one block, from its upper triangle by rows."""
    size = next(size for size in range(1, 99) if size * (size - 1) // 2 == triangle.size)
    found = np.zeros((size, size))
    found[np.triu_indices(size, 1)] = triangle
    return found - found.T


def rotation(net: Net, width: int) -> np.ndarray:
    """Return R of equation 3, in float64."""
    triangles = numbers(next(iter(net.layer.delta_parameters().values())))
    blocks = [(np.eye(len(q)) - q) @ np.linalg.inv(np.eye(len(q)) + q) for q in map(skew, triangles)]
    size = len(blocks[0])
    found = np.zeros((width, width))
    for index in range(width // size):
        part = slice(index * size, (index + 1) * size)
        found[part, part] = blocks[index % len(blocks)]
    return found


@pytest.mark.parametrize("settings", [{"oft_block_size": 2}, {"r": 2, "oft_block_size": 0}, {"oft_block_size": 32},
                                      {"oft_block_size": 4, "block_share": True}])
def test_inputs_are_turned_by_the_papers_matrix(settings, mode):
    net, x = adapted(nn.Dense(8, 3), **EXACT, **settings), inputs(5, 8)
    turn = rotation(net, 8)
    np.testing.assert_allclose(turn @ turn.T, np.eye(8), atol=1e-12)
    weight, bias = numbers(net.layer.weight), numbers(net.layer.bias)
    np.testing.assert_allclose(net(x).asnumpy(), numbers(x) @ turn @ weight.T + bias, rtol=1e-5, atol=1e-6)
    mp.set_lora_scale(net, 0.25)
    part = np.eye(8) + 0.25 * (turn - np.eye(8))
    np.testing.assert_allclose(net(x).asnumpy(), numbers(x) @ part @ weight.T + bias, rtol=1e-5, atol=1e-6)


def test_a_kernel_is_turned_as_one_row_for_each_output(mode):
    # PEFT's forward is wrong for kernels above 1 x 1; this is its merge, and the paper: d is channels times places.
    layer = nn.Conv2d(4, 3, (3, 2), pad_mode="valid", has_bias=True)
    net, x = adapted(layer, oft_block_size=6, **EXACT), inputs(2, 4, 5, 4)
    turn = rotation(net, 24)
    plain = nn.Conv2d(4, 3, (3, 2), pad_mode="valid", has_bias=True)
    plain.weight.set_data(Tensor((numbers(layer.weight).reshape(3, 24) @ turn.T).reshape(3, 4, 3, 2), ms.float32))
    plain.bias.set_data(layer.bias)
    np.testing.assert_allclose(net(x).asnumpy(), plain(x).asnumpy(), rtol=1e-5, atol=1e-5)


def test_a_tables_rows_are_turned(mode):
    net, ids = adapted(nn.Embedding(7, 4), oft_block_size=2, **EXACT), Tensor(np.array([[0, 3], [6, 3]], np.int32))
    assert list(net.layer.delta_parameters()) == ["mindpet_delta_oft_embedding_r"]
    np.testing.assert_allclose(net(ids).asnumpy(), numbers(net.layer.weight)[ids.asnumpy()] @ rotation(net, 4),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 7])
def test_the_series_is_pefts(terms, mode):
    net, x = adapted(nn.Dense(4, 4, has_bias=False), oft_block_size=4, num_cayley_neumann_terms=terms), inputs(3, 4)
    q = skew(numbers(net.layer.mindpet_delta_oft_r)[0])
    factors = {2: (2,), 3: (2, 2, 1), 4: (2, 2, 1), 5: (2, 2, 2, 1), 7: (2, 2, 2, 2, 2, 1)}[terms]
    turn = np.eye(4) + sum(factor * np.linalg.matrix_power(q, power) for power, factor in enumerate(factors, 1))
    np.testing.assert_allclose(net(x).asnumpy(), numbers(x) @ turn @ numbers(net.layer.weight).T, rtol=1e-5, atol=1e-5)


def test_the_series_turns_the_other_way():
    few, exact = (adapted(nn.Dense(4, 4), 0.02, oft_block_size=4, **settings) for settings in (
        {"num_cayley_neumann_terms": 7}, EXACT))
    by_series = few.layer.differences().asnumpy()[0] + np.eye(4)
    np.testing.assert_allclose(by_series, rotation(exact, 4).T, atol=1e-6)


@pytest.mark.parametrize(("width", "wanted", "found"), [
    (64, 8, 8), (64, 100, 64), (12, 5, 4), (12, 8, 6), (12, 10, 12), (7, 2, 1), (7, 5, 7), (27, 4, 3), (30, 8, 6)])
def test_the_nearest_divisor_is_taken_and_of_two_the_lower(width, wanted, found):
    assert nearest_divisor(width, wanted) == found


def ball(spread: float = 0.3) -> Net:
    return adapted(nn.Dense(8, 3), spread, oft_block_size=4, coft=True, eps=0.2, **EXACT)


def test_coft_uses_what_it_projects_and_takes_the_gradient_there(mode):
    net, plain, x = ball(), adapted(nn.Dense(8, 3), oft_block_size=4, **EXACT), inputs(5, 8)
    triangles = net.layer.mindpet_delta_oft_r
    before = numbers(triangles)
    lengths = np.sqrt(2 * np.square(before).sum(1, keepdims=True))
    assert (lengths > 0.2 / np.sqrt(2)).all()
    projected = before * (0.2 / np.sqrt(2)) / lengths
    for name in ("weight", "bias"):
        put(getattr(plain.layer, name), getattr(net.layer, name))
    put(plain.layer.mindpet_delta_oft_r, Tensor(projected, ms.float32))
    weights = np.random.default_rng(1).standard_normal((5, 3))
    ours, theirs = (gradient_function(one, [one.layer.mindpet_delta_oft_r], x, weights)() for one in (net, plain))
    np.testing.assert_allclose(ours[0].asnumpy(), theirs[0].asnumpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours[2][0].asnumpy(), theirs[2][0].asnumpy(), rtol=1e-5, atol=1e-6)
    assert np.array_equal(numbers(triangles), before), "a forward changes nothing"
    net.layer.project()
    np.testing.assert_allclose(numbers(triangles), projected, rtol=1e-6)
    np.testing.assert_allclose(net(x).asnumpy(), ours[0].asnumpy(), rtol=1e-6, atol=1e-6)


def test_what_is_inside_the_ball_stays_bit_for_bit():
    inside, free = ball(0.005).layer, adapted(nn.Dense(8, 3), 0.005, oft_block_size=4, **EXACT).layer
    assert np.array_equal(inside.differences().asnumpy(), free.differences().asnumpy())
    for layer in (inside, free):
        before = layer.mindpet_delta_oft_r.asnumpy()
        layer.project()
        assert np.array_equal(layer.mindpet_delta_oft_r.asnumpy(), before)


def test_dropout_makes_blocks_i_in_training_alone(mode):
    net = adapted(nn.Dense(16, 16, has_bias=False), oft_block_size=4, module_dropout=0.5, **EXACT)
    put(net.layer.weight, Tensor(np.eye(16), ms.float32))
    x = inputs(3, 16)
    whole, same = numbers(x) @ rotation(net, 16), numbers(x)
    np.testing.assert_allclose(net(x).asnumpy(), whole, rtol=1e-5, atol=1e-6)
    net.set_train()
    kept = []
    for _ in range(30):
        y = net(x).asnumpy()
        for block in range(4):
            part = slice(4 * block, 4 * block + 4)
            kept.append(np.allclose(y[:, part], whole[:, part], rtol=1e-5, atol=1e-6))
            assert kept[-1] or np.array_equal(y[:, part], same[:, part].astype(np.float32))
    assert 0.3 < np.mean(kept) < 0.7
    assert not hasattr(adapted(nn.Dense(8, 3)).layer, "block_dropout")


@pytest.mark.parametrize(("bias", "expected"), [("none", set()), ("oft_only", {"0.bias"}),
                                                ("all", {"0.bias", "1.bias"})])
def test_biases_that_train_beside_come_back(bias, expected):
    def plain():
        return nn.SequentialCell(nn.Dense(8, 4), nn.Dense(4, 2))

    net = mp.get_pet_model(plain(), mp.OFTConfig(target_modules=["0"], oft_block_size=4, bias=bias))
    assert {path for path, item in net.parameters_and_names()
            if item.requires_grad and "delta" not in path} == expected
    for item in net.trainable_params():
        put(item, Tensor(np.full(item.shape, 0.5, np.float32)))
    mp.save_adapter(net, "adapter")
    again = mp.load_adapter(plain(), "adapter")
    assert all((again.parameters_dict()[item.name].asnumpy() == 0.5).all() for item in net.trainable_params())


def test_a_random_start():
    np.random.seed(0)
    net = mp.get_pet_model(Net(nn.Dense(64, 4)), mp.OFTConfig(target_modules=["layer"], init_weights=False))
    assert 0.09 < numbers(net.layer.mindpet_delta_oft_r).std() < 0.11


def test_half_types_are_turned_in_float32_and_applied_in_their_own(mode):
    layer = nn.Dense(8, 4, dtype=ms.float16)
    net, x = adapted(layer, oft_block_size=4, param_init_type=ms.float16, **EXACT), inputs(3, 8, dtype=ms.float16)
    y = net(x)
    assert y.dtype == ms.float16 and net.layer.mindpet_delta_oft_r.dtype == ms.float16
    wanted = numbers(x) @ rotation(net, 8) @ numbers(layer.weight).T + numbers(layer.bias)
    np.testing.assert_allclose(y.asnumpy(), wanted, rtol=5e-3, atol=5e-3)


def test_another_dropout_is_no_reason_to_refuse_a_file():
    net = adapted(nn.Dense(8, 3), oft_block_size=4, module_dropout=0.25)
    mp.save_adapter(net, "adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["module_dropout"] == 0.25 and config["peft_type"] == "OFT"
    other = adapted(nn.Dense(8, 3), oft_block_size=4)
    mp.load_adapter(other, "adapter")
    assert np.array_equal(numbers(other.layer.mindpet_delta_oft_r), numbers(net.layer.mindpet_delta_oft_r))


@pytest.mark.parametrize(("change", "refused"), [
    ({"peft_version": "0.17.1"}, True), ({"peft_version": None}, True), ({"peft_version": "0.18.0.dev0@abc"}, False),
    ({"peft_version": "1.0"}, False), ({"peft_version": "0.15.0", "use_cayley_neumann": False}, False),
    ({"bias": "all"}, True)])
def test_files_whose_numbers_would_be_others_are_refused(change, refused):
    mp.save_adapter(adapted(nn.Dense(8, 3), oft_block_size=4), "adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if refused:
        with pytest.raises(ValueError, match="PEFT before 0.18|bias = 'all' is not supported"):
            mp.load_adapter(Net(nn.Dense(8, 3)), "adapter")
    else:
        mp.load_adapter(Net(nn.Dense(8, 3)), "adapter")


@pytest.mark.parametrize(("layer", "settings", "message"), [
    (lambda: nn.Dense(7, 2), {"oft_block_size": 2}, "cuts into blocks of 1"),
    (lambda: nn.Dense(8, 2), {"r": 8, "oft_block_size": 0}, "r=8 cuts into blocks of 1"),
    (lambda: nn.Conv2d(4, 4, 3, group=2), {}, "2 groups")])
def test_layers_that_nothing_can_turn_are_refused(layer, settings, message):
    with pytest.raises(ValueError, match=message):
        mp.get_pet_model(Net(layer()), mp.OFTConfig(target_modules=["layer"], **settings))


@pytest.mark.parametrize(("settings", "message"), [
    ({"r": 4}, "give r or oft_block_size"), ({"oft_block_size": 0}, "give r or oft_block_size"),
    ({"r": -1}, "r must be"), ({"oft_block_size": 4.0}, "oft_block_size must be"),
    ({"module_dropout": 1.0}, "module_dropout must be"), ({"bias": "lora_only"}, "bias must be one of"),
    ({"eps": 0}, "eps must be"), ({"coft": 1}, "coft must be"), ({"num_cayley_neumann_terms": 1}, "num_cayley"),
    ({"block_share": "yes"}, "block_share must be"), ({"init_weights": None}, "init_weights must be")])
def test_wrong_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mp.OFTConfig(target_modules=["layer"], **settings)
