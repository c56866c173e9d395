"""The low-rank adapter's own: names, start, LowRankLinear and its sharding; the rest is in test_adapter."""
from __future__ import annotations

import inspect

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.common.initializer import Normal, One
from nets import TOLERANCE, gradients_of, inputs, numbers, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import LowRankAdapterConfig, LowRankAdapterDense, LowRankAdapterLayer, LowRankLinear

LEFT, RIGHT = "mindpet_delta_low_rank_adapter_weight_left", "mindpet_delta_low_rank_adapter_weight_right"
DOWN, UP = "mindpet_delta_low_rank_adapter_down_sampler", "mindpet_delta_low_rank_adapter_up_sampler"


def factors(part: LowRankLinear) -> tuple[np.ndarray, np.ndarray]:
    return numbers(getattr(part, LEFT)), numbers(getattr(part, RIGHT))


def test_signatures_are_mindpets():
    linear, layer, dense = (inspect.signature(item).parameters
                            for item in (LowRankLinear, LowRankAdapterLayer, LowRankAdapterDense))
    types = {"param_init_type": ms.float32, "compute_dtype": None}
    own = {"low_rank_size": 1, "low_rank_w_init": "xavier_uniform", "non_linearity": "gelu", **types}
    plain = {"weight_init": "normal", "bias_init": "zeros", "has_bias": True}
    assert list(linear)[:2] == list(dense)[:2] == ["in_channels", "out_channels"]
    assert {name: item.default for name, item in list(linear.items())[2:]} == {"rank": 1, **plain, **types}
    assert list(layer)[:2] == ["hidden_size", "reduction_factor"]
    assert layer["reduction_factor"].default is inspect.Parameter.empty
    assert {name: item.default for name, item in list(layer.items())[2:]} == own
    assert list(dense.items())[-1][0] == "dtype"
    assert {name: item.default for name, item in list(dense.items())[2:-1]} == {
        **plain, "activation": None, "reduction_factor": 1, **own}
    maps = ["strategy_matmul_down_sampler_weight", "strategy_matmul_down_sampler_input", "strategy_bias_down_sampler",
            "strategy_non_linearity", "strategy_matmul_up_sampler_weight", "strategy_matmul_up_sampler_input",
            "strategy_bias_up_sampler", "strategy_residual_add"]
    assert list(inspect.signature(LowRankAdapterLayer.shard).parameters)[1:] == maps
    assert list(inspect.signature(LowRankAdapterDense.shard).parameters)[1:] == [
        "strategy_matmul_org", "strategy_bias_org", "strategy_activation_org", *maps]
    assert list(inspect.signature(LowRankLinear.shard).parameters)[1:] == [
        "strategy_matmul_weight", "strategy_matmul_input", "strategy_bias"]


def test_names_shapes_and_start():
    net = nn.SequentialCell(LowRankAdapterDense(6, 8, reduction_factor=3, low_rank_size=2), LowRankAdapterLayer(8, 3))
    shapes = {f"{DOWN}.{LEFT}": (8, 2), f"{DOWN}.{RIGHT}": (2, 2), f"{DOWN}.bias": (2,),
              f"{UP}.{LEFT}": (2, 2), f"{UP}.{RIGHT}": (2, 8), f"{UP}.bias": (8,)}
    found = {item.name: item.shape for item in net.trainable_params()}
    assert {name: shape for name, shape in found.items() if name.startswith("0")} == {
        "0.weight": (8, 6), "0.bias": (8,),
        **{f"0.mindpet_delta_low_rank_adapter.{name}": shape for name, shape in shapes.items()}}
    assert {name for name in found if name.startswith("1")} == {f"1.{name}" for name in shapes}
    layer = net[0].mindpet_delta_low_rank_adapter
    assert isinstance(layer, LowRankAdapterLayer) and layer.bottleneck_size == net[0].bottleneck_size == 8 // 3
    assert layer.non_linearity == "gelu" and isinstance(layer.mindpet_delta_low_rank_adapter_non_linear, nn.GELU)
    assert not np.any(factors(getattr(layer, UP))[1])
    # What starts by low_rank_w_init: Xavier-uniform is bounded by sqrt(6 / (rows + columns)).
    big = LowRankAdapterLayer(300, 3, low_rank_size=50)
    for part, name, (rows, columns) in ((DOWN, LEFT, (300, 50)), (DOWN, RIGHT, (50, 100)), (UP, LEFT, (100, 50))):
        assert np.abs(numbers(getattr(getattr(big, part), name))).max() == \
            pytest.approx(np.sqrt(6 / (rows + columns)), rel=1e-2)
    ones = LowRankAdapterLayer(8, 2, low_rank_w_init=One(), param_init_type=ms.float16)
    assert all(np.all(item == 1) for item in (*factors(getattr(ones, DOWN)), factors(getattr(ones, UP))[0]))
    assert {item.dtype for item in ones.trainable_params()} == {ms.float16}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_low_rank_linear_is_its_formula(shape, has_bias, mode):
    layer = LowRankLinear(6, 4, 2, Normal(0.5), "normal", has_bias)
    x, weights = inputs(*shape), np.random.default_rng(1).standard_normal((*shape[:-1], 4))
    left, right = factors(layer)
    expected = numbers(x) @ left @ right + (numbers(layer.bias) if has_bias else 0)
    y, by_x, found = gradients_of(layer, layer.trainable_params(), x, weights)
    np.testing.assert_allclose(numbers(y), expected, **TOLERANCE[ms.float32])
    np.testing.assert_allclose(numbers(by_x), weights @ (left @ right).T, rtol=1e-5, atol=2e-6)
    by_weight = numbers(x).reshape(-1, 6).T @ weights.reshape(-1, 4)
    wanted = [by_weight @ right.T, left.T @ by_weight, weights.reshape(-1, 4).sum(0)]
    assert len(found) == 2 + has_bias
    for value, gradient in zip(found, wanted):
        np.testing.assert_allclose(numbers(value), gradient, rtol=1e-5, atol=5e-6)


def test_low_rank_linear_starts_both_factors_by_weight_init():
    layer = LowRankLinear(300, 200, 100)
    assert {item.name: item.shape for item in layer.trainable_params()} == {
        LEFT: (300, 100), RIGHT: (100, 200), "bias": (200,)}
    for value in factors(layer):
        assert value.std() == pytest.approx(0.01, rel=2e-2)
    assert not np.any(layer.bias.asnumpy())
    assert np.all(LowRankLinear(6, 4, bias_init=Tensor(np.ones(4, np.float32))).bias.asnumpy() == 1)
    assert "rank=100" in str(layer) and (layer.in_channels, layer.out_channels, layer.rank) == (300, 200, 100)


@pytest.mark.parametrize("compute_dtype", [None, ms.float16], ids=str)
@pytest.mark.parametrize("to_float", [None, ms.float16], ids=str)
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
def test_low_rank_linears_types(compute_dtype, to_float, dtype, mode):
    layer = LowRankLinear(6, 4, 2, "ones", compute_dtype=compute_dtype)
    if to_float is not None:
        nn.SequentialCell(layer).to_float(to_float)
    assert layer._compute_type() == (compute_dtype or to_float or ms.float32)
    y = layer(inputs(5, 6, dtype=dtype))
    assert y.dtype == (to_float or dtype)
    np.testing.assert_allclose(numbers(y), 2 * numbers(inputs(5, 6)).sum(-1, keepdims=True) * np.ones(4), rtol=1e-2,
                               atol=1e-2)


class Bare(nn.Cell):
    """A net of LowRankLinear by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Dense(6, 6)
        self.fc = LowRankLinear(6, 4, 2, Normal(0.5))

    def construct(self, x):
        return self.fc(self.head(x))


def test_low_rank_linear_by_hand(tmp_path, mode):
    net, x = Bare(), inputs(5, 6)
    mp.freeze_delta(net, "low_rank_adapter")
    assert {item.name for item in net.trainable_params()} == {f"fc.{LEFT}", f"fc.{RIGHT}"}
    mp.freeze_delta(net, "low_rank_adapter", exclude=["fc.bias"])
    assert len(net.trainable_params()) == 3
    randomise(net)
    mp.save_adapter(net, tmp_path / "a")
    other = Bare()
    ms.load_param_into_net(other.head, {item.name: item for item in net.head.get_parameters()})
    mp.load_adapter(other, tmp_path / "a")
    assert np.array_equal(other(x).asnumpy(), net(x).asnumpy())
    assert mp.summary(net).rows[0][:3] == ("fc", "LowRankLinear", "low_rank_adapter")
    for call, reason in ((lambda: mp.set_lora_scale(net, 0.5), "no base beneath it"),
                         (lambda: mp.merge(net), "no weight beneath it")):
        with unchanged(net), pytest.raises(ValueError, match=reason):
            call()


# The products of MindPet are L R, and the input by that; ours are the input by L, and that by R.
@pytest.mark.parametrize("given, left, right", [
    ({"strategy_matmul_weight": ((1, 1), (1, 1)), "strategy_matmul_input": ((1, 1), (1, 1))},
     ((1, 1), (1, 1)), ((1, 1), (1, 1))),
    ({"strategy_matmul_weight": ((1, 2), (2, 4)), "strategy_matmul_input": ((8, 1), (1, 4))},
     ((8, 1), (1, 2)), ((8, 2), (2, 4))),
    ({"strategy_matmul_weight": ((4, 2), (2, 1))}, ((1, 4), (4, 2)), ((1, 2), (2, 1))),
    ({"strategy_matmul_input": ((2, 4), (4, 8))}, ((2, 4), (4, 1)), ((2, 1), (1, 8))),
])
def test_shard_of_the_two_products(given, left, right):
    layer = LowRankLinear(16, 16, 2)
    assert layer.shard(**given, strategy_bias=((8, 4), (4,))) is layer
    assert layer.matmul_input.in_strategy == left and layer.matmul_weight.in_strategy == right
    assert layer.bias_add.in_strategy == ((8, 4), (4,))
    dense = LowRankAdapterDense(6, 8)
    dense.shard(**{f"{name.rpartition('_')[0]}_up_sampler_{name.rpartition('_')[2]}": value
                   for name, value in given.items()})
    up = getattr(dense.mindpet_delta_low_rank_adapter, UP)
    assert up.matmul_input.in_strategy == left and up.matmul_weight.in_strategy == right
    LowRankLinear(6, 4, has_bias=False).shard(strategy_bias=((8, 4), (4,)))


@pytest.mark.parametrize("given, error, message", [
    ({"strategy_matmul_weight": 1}, TypeError, "strategy_matmul_weight must be a tuple of tuples"),
    ({"strategy_matmul_input": ((1, 1),)}, ValueError, "strategy_matmul_input must split the two axes"),
    ({"strategy_matmul_weight": ((1, 2), (4, 1))}, ValueError, "the inner axis alike"),
    ({"strategy_bias": "x"}, TypeError, "strategy_bias must be a tuple of tuples"),
])
def test_a_refused_strategy_of_low_rank_linear_sets_none(given, error, message):
    layer = LowRankLinear(6, 4)
    with pytest.raises(error, match=message):
        layer.shard(**{"strategy_matmul_input": ((2, 1), (1, 1)), **given})
    assert not any(getattr(part, "in_strategy", None)
                   for part in (layer.matmul_input, layer.matmul_weight, layer.bias_add))


@pytest.mark.parametrize("size, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_sizes(size, error):
    for call in (lambda: LowRankLinear(size, 4), lambda: LowRankLinear(6, size), lambda: LowRankLinear(6, 4, size),
                 lambda: LowRankAdapterLayer(size, 1), lambda: LowRankAdapterLayer(8, size),
                 lambda: LowRankAdapterLayer(8, 2, size), lambda: LowRankAdapterDense(6, 8, reduction_factor=size),
                 lambda: LowRankAdapterConfig(low_rank_size=size)):
        with pytest.raises(error, match="must be a positive int"):
            call()


def test_other_wrong_settings():
    for call in (lambda: LowRankAdapterLayer(8, 9), lambda: LowRankAdapterDense(6, 8, reduction_factor=9)):
        with pytest.raises(ValueError, match="reduction_factor must be at most hidden_size 8.*got 9"):
            call()
    net = nn.SequentialCell(nn.Dense(6, 8))
    with unchanged(net), pytest.raises(ValueError, match="0: reduction_factor must be at most hidden_size 8"):
        mp.get_pet_model(net, LowRankAdapterConfig(reduction_factor=9, target_modules=["0"]))
    for wrong in (1, None, Tensor(np.ones((8, 1), np.float32))):
        with pytest.raises(TypeError, match="low_rank_w_init must be an initialiser or its name"):
            LowRankAdapterLayer(8, 2, low_rank_w_init=wrong)
    with pytest.raises(ValueError, match="low_rank_w_init 'xavier' is no initialiser"):
        LowRankAdapterDense(6, 8, low_rank_w_init="xavier")
    with pytest.raises(TypeError, match="has_bias must be True or False"):
        LowRankLinear(6, 4, has_bias=1)
    with pytest.raises(TypeError, match="param_init_type"):
        LowRankLinear(6, 4, param_init_type=ms.float64)
    with pytest.raises(TypeError, match="compute_dtype"):
        LowRankLinear(6, 4, compute_dtype="float32")
    with pytest.raises(ValueError, match="bias_init must be a Tensor of shape"):
        LowRankLinear(6, 4, bias_init=Tensor(np.ones(3, np.float32)))
