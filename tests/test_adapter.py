"""Both adapters: non-linearities, types, layers placed by hand, files, sharding, settings; then the adapter's own."""
from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import cases_adapter
import cases_low_rank_adapter
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from nets import (
    TOLERANCE,
    Attention,
    compile_count,
    gradient_function,
    gradients_of,
    inputs,
    numbers,
    randomise,
    state,
    unchanged,
)

import mindpet_lite as mp
from mindpet_lite.config import as_config
from mindpet_lite.delta import (
    AdapterConfig,
    AdapterDense,
    AdapterLayer,
    Delta,
    LowRankAdapterConfig,
    LowRankAdapterDense,
    LowRankAdapterLayer,
)
from mindpet_lite.delta.activation import ACTIVATIONS
from mindpet_lite.delta.parts import put

BLOCK = "mindpet_delta_adapter_block.mindpet_delta_adapter_"
# For each method: its layer for 8 values, its Dense from 6 to 8, its config, and the layer's float64 reference.
KINDS = {
    "adapter": (lambda **more: AdapterLayer(8, **{"bottleneck_size": 5, **more}),
                lambda **more: AdapterDense(6, 8, **{"bottleneck_size": 5, **more}),
                AdapterConfig(bottleneck_size=5, target_modules=["to_q", "to_out.0"]), cases_adapter.of_layer),
    "low_rank_adapter": (lambda **more: LowRankAdapterLayer(8, **{"reduction_factor": 2, "low_rank_size": 2, **more}),
                         lambda **more: LowRankAdapterDense(6, 8, **{"reduction_factor": 2, "low_rank_size": 2,
                                                                     **more}),
                         LowRankAdapterConfig(reduction_factor=2, target_modules=["to_q", "to_out.0"]),
                         cases_low_rank_adapter.of_layer),
}
both_methods = pytest.mark.parametrize("method", sorted(KINDS))


class Block(nn.Cell):
    """A user's block with an adapter placed by hand after a frozen layer."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.fc = nn.Dense(6, 8)
        self.adapter = layer
        self.out = nn.Dense(8, 3)

    def construct(self, x):
        return self.out(self.adapter(self.fc(x)))


# Every non-linearity

@both_methods
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_output_and_gradients_with_every_non_linearity(method, name, mode):
    make, _, _, reference = KINDS[method]
    layer = make(non_linearity=name)
    randomise(layer)
    x, weights = inputs(3, 4, 8), np.random.default_rng(1).standard_normal((3, 4, 8))
    expected, by_parameter, by_x = reference(layer, numbers(x), weights)
    assert len(by_parameter) == len(layer.trainable_params())
    y, found_x, found = gradients_of(layer, list(by_parameter), x, weights)
    # The CPU kernels of these approximate, the first three beyond 3 only.
    rough = {"tanh": 3e-4, "tanhshrink": 3e-4, "mish": 3e-4, "logsoftmax": 2e-5}.get(name, 5e-6)
    for value, wanted in [(y, expected), (found_x, by_x), *zip(found, by_parameter.values())]:
        np.testing.assert_allclose(numbers(value), wanted, rtol=1e-5, atol=rough)


@both_methods
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_non_linearity_starts_as_the_identity_and_trains_whole(method, name, graph_mode):
    layer = KINDS[method][0](non_linearity=name)
    x, seen = inputs(3, 40, 8), {}
    assert np.array_equal(layer(x).asnumpy(), x.asnumpy())
    compute = gradient_function(layer, layer.trainable_params(), x, inputs(3, 40, 8, seed=5).asnumpy())
    for _ in range(2):
        _, _, found = compute()
        for parameter, gradient in zip(layer.trainable_params(), found):
            seen[parameter.name] = seen.get(parameter.name, False) or bool(np.any(gradient.asnumpy()))
            put(parameter, Tensor(parameter.asnumpy() - 0.1 * gradient.asnumpy()))
    assert all(seen.values()), seen


@both_methods
def test_softmax2d_says_what_shape_it_needs(method, mode):
    layer = KINDS[method][0](non_linearity="softmax2d")
    assert layer(inputs(2, 3, 5, 8)).shape == (2, 3, 5, 8)
    with pytest.raises(ValueError, match="3 or 4 dims, but got 2"):
        layer(inputs(5, 8)).asnumpy()


@both_methods
def test_prelus_slope_trains_and_is_saved(method, tmp_path, graph_mode):
    def build():
        return Block(KINDS[method][0](non_linearity="PReLU", param_init_type=ms.float16))
    net = build()
    slopes = [item for name, item in net.parameters_and_names() if name.endswith("non_linear.w")]
    assert [item.dtype for item in slopes] == [ms.float16] and slopes[0].requires_grad
    mp.freeze_delta(net, method)
    randomise(net)
    mp.save_adapter(net, tmp_path / "a")
    other = build()
    mp.load_adapter(other, tmp_path / "a")
    other_slope = next(item for name, item in other.parameters_and_names() if name.endswith("non_linear.w"))
    assert slopes[0].asnumpy() == other_slope.asnumpy() != 0.25


# Types and shapes

@both_methods
@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (1, 2, 1, 2, 8)])
def test_any_number_of_leading_axes(method, shape, mode):
    make, _, _, reference = KINDS[method]
    layer = make()
    randomise(layer)
    expected, _, _ = reference(layer, numbers(inputs(*shape)), np.ones(shape))
    np.testing.assert_allclose(numbers(layer(inputs(*shape))), expected, **TOLERANCE[ms.float32])


@both_methods
@pytest.mark.parametrize("input_type", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("compute_dtype", [None, ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("to_float", [None, ms.float32, ms.float16], ids=str)
def test_output_type_is_what_to_float_set_else_the_input_type(method, input_type, compute_dtype, to_float, mode):
    make, make_dense, _, reference = KINDS[method]
    layer, dense = make(compute_dtype=compute_dtype), make_dense(compute_dtype=compute_dtype, dtype=ms.float16)
    randomise(layer)
    if to_float is not None:
        assert layer.to_float(to_float) is layer
        nn.SequentialCell(dense).to_float(to_float)
    assert layer._compute_type() == (compute_dtype or to_float or ms.float32)
    assert dense._compute_type() == (compute_dtype or to_float or ms.float16)
    x = inputs(5, 8, dtype=input_type)
    y = layer(x)
    assert y.dtype == dense(inputs(5, 6, dtype=input_type)).dtype == (to_float or input_type)
    rough = ms.float16 in (layer._compute_type(), y.dtype)
    np.testing.assert_allclose(numbers(y), reference(layer, numbers(x), np.ones((5, 8)))[0],
                               **TOLERANCE[ms.float16 if rough else ms.float32])


@both_methods
def test_the_delta_is_computed_in_the_compute_type_and_added_in_the_inputs(method, mode):
    layer, x = KINDS[method][0](compute_dtype=ms.float16), inputs(5, 8)
    assert np.array_equal(layer(x).asnumpy(), x.asnumpy())
    randomise(layer)
    added = layer(Tensor(np.zeros((5, 8), np.float32))).asnumpy()
    assert np.any(added) and np.array_equal(added, added.astype(np.float16).astype(np.float32))
    low = KINDS[method][0](param_init_type=ms.float16)
    assert {item.dtype for item in low.trainable_params()} == {ms.float16} == {low._compute_type()}


@both_methods
def test_a_fp16_base_with_a_fp32_adapter_computes_in_fp16(method, mode):
    dense = KINDS[method][1](dtype=ms.float16)
    assert {item.dtype for item in dense.delta_parameters().values()} == {ms.float32}
    randomise(dense)
    y = dense(inputs(5, 6)).asnumpy()
    assert np.array_equal(y, y.astype(np.float16).astype(np.float32))


# Placed by hand

@both_methods
def test_a_layer_by_hand_is_frozen_trained_saved_and_loaded(method, tmp_path, mode):
    net, x = Block(KINDS[method][0]()), inputs(5, 6)
    mp.freeze_delta(net, method)
    own = {item.name for item in net.adapter.delta_parameters().values()}
    assert {item.name for item in net.trainable_params()} == own
    assert own == {f"adapter.{path}" for path in net.adapter.delta_parameters()}
    before = {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-2)).set_train()
    for _ in range(3):
        step(x, Tensor(np.ones((5, 3), np.float32)))
    assert {item.name for item in net.get_parameters() if item.asnumpy().tobytes() != before[item.name]} == own
    mp.save_adapter(net, tmp_path / "a")
    layers = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["layers"]
    assert layers["adapter"]["settings"] == net.adapter.settings()
    other = Block(KINDS[method][0]())
    for mine, theirs in ((other.fc, net.fc), (other.out, net.out)):
        ms.load_param_into_net(mine, {item.name: item for item in theirs.get_parameters()})
    mp.load_adapter(other, tmp_path / "a")
    assert np.array_equal(other(x).asnumpy(), net(x).asnumpy())


@both_methods
def test_a_layer_by_hand_is_listed_steered_and_not_merged(method, capsys, mode):
    net, x = Block(KINDS[method][0]()), inputs(5, 6)
    mp.freeze_delta(net, method)
    randomise(net)
    rows = mp.summary(net).rows
    assert [row[:3] for row in rows] == [("adapter", type(net.adapter).__name__, method)]
    assert "non_linearity=gelu" in rows[0][3]
    full, base = net(x).asnumpy(), net.out(net.fc(x)).asnumpy()
    with compile_count() as compiled:
        with mp.adapters_disabled(net):
            assert np.array_equal(net(x).asnumpy(), base)
        mp.set_lora_scale(net, 0.5)
        np.testing.assert_allclose(net(x).asnumpy(), (full + base) / 2, rtol=1e-5, atol=1e-6)
    assert not compiled and "strength=0.5" in mp.summary(net).rows[0][3]
    for call in (lambda: mp.merge(net), net.adapter.plain_cell, net.adapter.merged_value):
        with unchanged(net), pytest.raises((ValueError, NotImplementedError), match="non-linearity .* no weight"):
            call()


@both_methods
def test_what_lies_inside_an_adapter_is_no_target(method):
    net = Block(KINDS[method][0]())
    mp.get_pet_model(net, mp.LoraConfig(target_modules="all-linear", lora_rank=2))
    assert [path for path, cell in net.cells_and_names() if isinstance(cell, mp.LoRADense)] == ["fc", "out"]


# Injected

@both_methods
def test_injection_starts_as_the_base_and_names_stand_beside_its(method, mode):
    net, x = Attention(), inputs(4, 6)
    base, names = net(x).asnumpy(), {item.name for item in net.get_parameters()}
    mp.get_pet_model(net, KINDS[method][2])
    assert np.array_equal(net(x).asnumpy(), base)
    new = {item.name for item in net.get_parameters()} - names
    assert {name.partition(f".mindpet_delta_{method}.")[0] for name in new if "mindpet" in name} == {"to_q", "to_out.0"}
    live = {"to_q.scaling", "to_out.0.scaling"}
    assert {name for name in new if "mindpet" not in name} == live
    assert {item.name for item in net.trainable_params()} == new - live
    assert isinstance(net.to_q, nn.Dense) and net.to_out[0].activation_flag


@both_methods
def test_from_dense_takes_over_the_parameters_and_leaves_the_dense(method, mode):
    dense, kind = nn.Dense(6, 8, activation="tanh"), type(KINDS[method][1]())
    layer = kind.from_dense(dense, 2, non_linearity="Mish", compute_dtype=ms.float32)
    assert layer.weight is dense.weight and layer.bias is dense.bias and layer.matmul is dense.matmul
    assert dense.weight.name == "weight" and layer.settings()["non_linearity"] == "mish"
    assert kind.from_dense(dense, 2).plain_cell() is dense and layer.plain_cell().weight is dense.weight
    assert np.array_equal(layer(inputs(5, 6)).asnumpy(), dense(inputs(5, 6)).asnumpy())
    for wrong, reason in ((layer, "adapted already"), (nn.Conv2d(1, 1, 1), "not Conv2d")):
        with pytest.raises(TypeError, match=reason):
            kind.from_dense(wrong)


@both_methods
def test_a_config_from_yaml_rebuilds_the_settings(method):
    fields = {"adapter": "bottleneck_size: 3", "low_rank_adapter": "reduction_factor: 2\n  low_rank_size: 3"}[method]
    Path("pet.yaml").write_text(f"pet_config:\n  pet_type: {method}\n  {fields}\n  non_linearity: ReLU\n"
                                f"  param_init_type: float16\n  target_modules: [fc]\n", encoding="utf-8")
    net = mp.get_pet_model(Block(nn.Identity()), "pet.yaml")
    assert net.fc.settings() == json.loads(json.dumps(net.fc.settings()))
    assert {f"{name}: {value}" for name, value in net.fc.settings().items()} == \
        {"non_linearity: relu", *(line.strip() for line in fields.splitlines())}
    assert {item.dtype for item in net.trainable_params()} == {ms.float16}
    assert as_config("pet.yaml").non_linearity == "relu"


@both_methods
def test_a_file_of_another_non_linearity_or_size_is_refused(method, tmp_path):
    _, make, _, _ = KINDS[method]
    mp.save_adapter(nn.SequentialCell(make(non_linearity="relu")), tmp_path / "a")
    net = nn.SequentialCell(make())
    with unchanged(net), pytest.raises(ValueError, match="0: non_linearity is 'gelu' in the net, 'relu' in the file"):
        mp.load_adapter(net, tmp_path / "a")
    other = {"adapter": {"bottleneck_size": 4}, "low_rank_adapter": {"reduction_factor": 4}}[method]
    net = nn.SequentialCell(make(non_linearity="relu", **other))
    with unchanged(net), pytest.raises(ValueError, match="misshapen"):
        mp.load_adapter(net, tmp_path / "a")
    plain = nn.SequentialCell(nn.Dense(6, 8))
    mp.load_adapter(plain, tmp_path / "a")
    assert plain[0].settings() == make(non_linearity="relu").settings()


@both_methods
def test_checkpoints_by_mindpets_names_load(method, tmp_path, mode):
    def build():
        net = nn.SequentialCell(KINDS[method][1](), KINDS[method][0]())
        mp.freeze_delta(net, method)
        return net
    net = build()
    randomise(net)
    entries = [{"name": item.name, "data": item} for item in net.trainable_params()]
    assert all(f".mindpet_delta_{method}" in entry["name"] for entry in entries)
    ms.save_checkpoint(entries, str(tmp_path / "x.ckpt"))
    first, second = build(), build()
    assert not np.any([np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in
                       zip(first.trainable_params(), net.trainable_params())])
    mp.load_adapter(first, tmp_path / "x.ckpt")
    missing, unused = ms.load_param_into_net(second, ms.load_checkpoint(str(tmp_path / "x.ckpt")))
    assert not unused and {name.rpartition(".")[2] for name in missing} == {"weight", "bias", "scaling"}
    for other in (first, second):
        for ours, theirs in zip(other.trainable_params(), net.trainable_params()):
            assert np.array_equal(ours.asnumpy(), theirs.asnumpy()), ours.name


@both_methods
def test_a_copy_is_independent_and_whole(method, mode):
    net, x = nn.SequentialCell(KINDS[method][1]()), inputs(5, 6)
    randomise(net)
    other = copy.deepcopy(net)
    full = net(x).asnumpy()
    with mp.adapters_disabled(other):
        assert not np.allclose(other(x).asnumpy(), full) and np.array_equal(net(x).asnumpy(), full)
    assert np.array_equal(other(x).asnumpy(), full)
    assert other[0].scaling is other[0].bottleneck.scaling is not net[0].scaling


# Sharding

def in_strategies(net: nn.Cell) -> dict:
    """Return the strategy of every operator that has one, by path."""
    return {f"{path}.{name}".lstrip("."): part.in_strategy for path, cell in net.cells_and_names()
            for name, part in vars(cell).items()
            if isinstance(part, ops.Primitive) and getattr(part, "in_strategy", None)}


@both_methods
def test_shard_of_the_layers_own_operators(method):
    layer = KINDS[method][0]()
    done = layer.shard(strategy_non_linearity=((2, 4),), strategy_bias_up_sampler=((2, 4), (4,)),
                       strategy_residual_add=((2, 1), (2, 1)))
    assert done is layer
    found = in_strategies(layer)
    inner = {key: value for key, value in found.items() if "mindpet" in key}
    assert {key: value for key, value in found.items() if key not in inner} == {
        "low_mul": ((2, 4), ()), "bias_mul": ((4,), ()), "residual_add": ((2, 1), (2, 1))}
    assert {key.rpartition("adapter_")[2]: value for key, value in inner.items()} == {
        "non_linear.gelu": ((2, 4),), "up_sampler.bias_add": ((2, 4), (4,))}


@both_methods
@pytest.mark.parametrize("activation, operator", [("leakyrelu", "select_op"), ("logsigmoid", "log"), ("relu", "relu")])
def test_shard_of_the_dense_and_its_activation(method, activation, operator):
    dense, strategy = KINDS[method][1](activation=activation, non_linearity=activation), ((2, 1), (2, 1))
    assert dense.shard(((2, 1), (4, 1)), ((2, 4), (4,)), strategy, strategy_non_linearity=strategy) is dense
    assert dense.matmul.in_strategy == ((2, 1), (4, 1)) and dense.bias_add.in_strategy == ((2, 4), (4,))
    assert getattr(dense.activation, operator).in_strategy == strategy
    assert getattr(dense.bottleneck._parts()[1], operator).in_strategy == strategy
    KINDS[method][1](has_bias=False).shard(strategy_bias_org=((2, 4), (4,)), strategy_activation_org=((2, 1),))


@both_methods
@pytest.mark.parametrize("arguments, error, message", [
    ({"strategy_matmul_org": 1}, TypeError, "strategy_matmul_org must be a tuple of tuples"),
    ({"strategy_residual_add": ((1, 1.5),)}, TypeError, "strategy_residual_add"),
    ({"strategy_non_linearity": 1}, TypeError, "strategy_non_linearity"),
    ({"strategy_bias_up_sampler": [1]}, TypeError, "strategy_bias_up_sampler"),
    ({"strategy_activation_org": ((1, 1),)}, ValueError, "strategy_activation_org: LogSoftmax cannot be split"),
    ({"strategy_non_linearity": ((1, 1),)}, ValueError, "strategy_non_linearity: Softmin is not made of one operator"),
    ({"strategy_non_linearity": ()}, ValueError, "strategy_non_linearity: the strategy must split the input"),
])
def test_a_refused_strategy_sets_none(method, arguments, error, message):
    dense = KINDS[method][1](activation="logsoftmax", non_linearity="softmin")
    with pytest.raises(error, match=message):
        dense.shard(**{"strategy_bias_org": ((2, 4), (4,)), "strategy_bias_down_sampler": ((2, 4), (4,)), **arguments})
    assert in_strategies(dense) == {}


# Settings

@both_methods
@pytest.mark.parametrize("settings, error, message", [
    ({"non_linearity": "reluu"}, TypeError, "non_linearity must be one of .*Did you mean 'relu'"),
    ({"non_linearity": None}, TypeError, "non_linearity"),
    ({"param_init_type": ms.float64}, TypeError, "param_init_type must be mindspore.float16, bfloat16 or float32"),
    ({"compute_dtype": "float16"}, TypeError, "compute_dtype"),
    ({"compute_dtype": ms.int32}, TypeError, "compute_dtype"),
])
def test_wrong_settings_are_named_everywhere(method, settings, error, message):
    make, make_dense, config, _ = KINDS[method]
    kind, dense = type(config), type(make_dense())
    for call in (make, make_dense, kind, lambda **more: dense.from_dense(nn.Dense(6, 8), **more)):
        with pytest.raises(error, match=message):
            call(**settings)


@both_methods
def test_unknown_activation_of_the_dense(method):
    with pytest.raises(KeyError, match="activation must be one of"):
        KINDS[method][1](activation="nothing")
    with pytest.raises(ValueError, match="activation must be one of"):
        KINDS[method][1](activation="nothing")
    with pytest.raises(TypeError, match="activation must be a name, a Cell, a Primitive or None"):
        KINDS[method][1](activation=1)
    assert isinstance(KINDS[method][1](activation=nn.ReLU()).activation, nn.ReLU)


@both_methods
def test_a_layer_too_narrow_or_adapted_already_is_refused_with_all_others(method):
    net = Attention()
    mp.get_pet_model(net, KINDS[method][2])
    with unchanged(net), pytest.raises(ValueError, match="to_q: .*adapted already") as raised:
        mp.get_pet_model(net, type(KINDS[method][2])(target_modules=["to_q", "nothing"]))
    assert "'nothing' hits nothing" in str(raised.value)


def test_defect_01_no_mindformers_is_needed(tmp_path):
    code = ("import sys; sys.modules['mindformers'] = None\n"
            "from mindpet_lite.delta import AdapterDense, LowRankAdapterDense\n"
            "import mindspore, numpy\n"
            "x = mindspore.Tensor(numpy.ones((2, 6), numpy.float32))\n"
            "print(AdapterDense(6, 4)(x).shape, LowRankAdapterDense(6, 4)(x).shape)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])})
    assert done.returncode == 0 and done.stdout.strip() == "(2, 4) (2, 4)", done.stderr


# The adapter's own

def test_signatures_are_mindpets():
    layer, dense = (inspect.signature(item).parameters for item in (AdapterLayer, AdapterDense))
    own = {"bottleneck_size": 64, "non_linearity": "gelu", "param_init_type": ms.float32, "compute_dtype": None}
    assert {name: item.default for name, item in list(layer.items())[1:]} == own
    assert list(layer)[0] == "hidden_size" and list(dense)[:2] == ["in_channels", "out_channels"]
    assert {name: item.default for name, item in list(dense.items())[2:-1]} == {
        "weight_init": "normal", "bias_init": "zeros", "has_bias": True, "activation": None, **own}
    assert list(dense)[-1] == "dtype" and dense["dtype"].kind is inspect.Parameter.KEYWORD_ONLY
    maps = ["strategy_matmul_down_sampler", "strategy_bias_down_sampler", "strategy_non_linearity",
            "strategy_matmul_up_sampler", "strategy_bias_up_sampler", "strategy_residual_add"]
    assert list(inspect.signature(AdapterLayer.shard).parameters)[1:] == maps
    assert list(inspect.signature(AdapterDense.shard).parameters)[1:] == [
        "strategy_matmul_org", "strategy_bias_org", "strategy_activation_org", *maps]


def test_names_shapes_and_start():
    net = nn.SequentialCell(AdapterDense(6, 8, bottleneck_size=5), AdapterLayer(8, 5))
    inside = {f"{BLOCK}down_sampler.weight": (5, 8), f"{BLOCK}down_sampler.bias": (5,),
              f"{BLOCK}up_sampler.weight": (8, 5), f"{BLOCK}up_sampler.bias": (8,)}
    assert {item.name: item.shape for item in net.trainable_params()} == {
        "0.weight": (8, 6), "0.bias": (8,), **{f"1.{name}": shape for name, shape in inside.items()},
        **{f"0.mindpet_delta_adapter.{name}": shape for name, shape in inside.items()}}
    assert {item.name for item in net.get_parameters() if not item.requires_grad} == {"0.scaling",
                                                                                      "1.scaling"}
    dense, layer = net
    assert isinstance(dense, Delta) and isinstance(dense.mindpet_delta_adapter, AdapterLayer)
    assert isinstance(layer.mindpet_delta_adapter_block, nn.SequentialCell)
    assert dense.bottleneck_size == 5 == layer.bottleneck_size and layer.non_linearity_name == "gelu"
    down, _, up = layer._parts()
    assert not np.any(up.weight.asnumpy()) and not np.any(up.bias.asnumpy()) and not np.any(down.bias.asnumpy())
    # Bound of the uniform distribution: sqrt(2 / (1 + 5)) · sqrt(3 / fan_in).
    start = AdapterLayer(400, 300)._parts()[0].weight.asnumpy()
    assert np.abs(start).max() == pytest.approx(1 / 20, rel=1e-2)
    assert start.std() == pytest.approx(1 / 20 / np.sqrt(3), rel=2e-2)


def test_a_net_that_ran_before_gets_filled_parameters(graph_mode):
    net = nn.SequentialCell(nn.Dense(6, 8))
    net(inputs(5, 6))
    mp.get_pet_model(net, AdapterConfig(target_modules=["0"]))
    down, _, _ = net[0].bottleneck._parts()
    assert np.any(down.weight.asnumpy()) and state(net)


def test_shard_of_the_maps():
    dense = AdapterDense(6, 8)
    dense.shard(strategy_matmul_down_sampler=((2, 4), (1, 4)), strategy_bias_down_sampler=((2, 1), (1,)),
                strategy_matmul_up_sampler=((2, 1), (4, 1)))
    down, _, up = dense.mindpet_delta_adapter._parts()
    assert down.matmul.in_strategy == ((2, 4), (1, 4)) and down.bias_add.in_strategy == ((2, 1), (1,))
    assert up.matmul.in_strategy == ((2, 1), (4, 1)) and not getattr(up.bias_add, "in_strategy", None)


@pytest.mark.parametrize("size, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError),
                                         ("8", TypeError)])
def test_sizes(size, error):
    for call in (lambda: AdapterLayer(size), lambda: AdapterDense(size, 8), lambda: AdapterDense(6, size)):
        with pytest.raises(error, match="must be a positive int"):
            call()
    for call in (lambda: AdapterLayer(8, size), lambda: AdapterDense(6, 8, bottleneck_size=size),
                 lambda: AdapterConfig(bottleneck_size=size)):
        with pytest.raises(error, match="bottleneck_size must be a positive int"):
            call()


def test_numpy_sizes_are_kept_as_pythons_own():
    layer = AdapterLayer(np.int64(8), np.int32(5))
    assert json.loads(json.dumps(layer.settings())) == {"bottleneck_size": 5, "non_linearity": "gelu"}
    assert "hidden_size=8, bottleneck_size=5, non_linearity=gelu" in str(layer)
