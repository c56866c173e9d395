"""LoRADense: signature, names, types, shapes, activations, validation, sharding, live scale."""
from __future__ import annotations

import copy
import inspect
import math
import warnings

import mindspore as ms
import numpy as np
import pytest
import reference
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer
from nets import TOLERANCE, Attention, base_parameters, compile_count, config, inputs, numbers, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import LoRADense


def expected(layer: LoRADense, x: Tensor, activation: str | None = None, scale: float | None = None) -> np.ndarray:
    return reference.forward(
        numbers(x), numbers(layer.weight), numbers(layer.bias) if layer.has_bias else None,
        numbers(layer.mindpet_delta_lora_a), numbers(layer.mindpet_delta_lora_b),
        layer.lora_alpha / layer.lora_rank if scale is None else scale, activation)


# Signature, names, shapes

def test_signature_is_mindpets():
    parameters = inspect.signature(LoRADense).parameters
    assert list(parameters) == ["in_channels", "out_channels", "lora_rank", "lora_alpha", "lora_dropout",
                                "lora_a_init", "lora_b_init", "param_init_type", "compute_dtype", "dense_kwargs"]
    defaults = {name: item.default for name, item in parameters.items() if item.default is not item.empty}
    he_uniform = defaults.pop("lora_a_init")
    assert defaults == {"lora_dropout": 0.0, "lora_b_init": "zeros", "param_init_type": ms.float32,
                        "compute_dtype": None}
    assert isinstance(he_uniform, HeUniform) and he_uniform.negative_slope == math.sqrt(5)
    assert parameters["dense_kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_positional_arguments_come_in_mindpets_order():
    layer = LoRADense(6, 4, 2, 8, 0.1, "ones", "zeros", ms.float16, ms.float32, has_bias=False, weight_init="ones",
                      activation="relu")
    assert (layer.in_channels, layer.out_channels, layer.lora_rank, layer.lora_alpha) == (6, 4, 2, 8)
    assert layer.lora_dropout.p == 0.1 and layer.compute_dtype == ms.float32
    assert layer.mindpet_delta_lora_a.dtype == ms.float16 and np.all(layer.mindpet_delta_lora_a.asnumpy() == 1)
    assert np.all(layer.weight.asnumpy() == 1) and layer.bias is None and isinstance(layer.activation, nn.ReLU)


def test_parameters_names_shapes_and_types():
    net = nn.SequentialCell(LoRADense(6, 4, 2, 8))
    layer = net[0]
    assert isinstance(layer, nn.Dense)
    assert {item.name: item.shape for item in net.trainable_params()} == {
        "0.weight": (4, 6), "0.bias": (4,), "0.mindpet_delta_lora_a": (2, 6), "0.mindpet_delta_lora_b": (4, 2)}
    assert not layer.scaling.requires_grad
    assert np.any(layer.mindpet_delta_lora_a.asnumpy()) and not np.any(layer.mindpet_delta_lora_b.asnumpy())


def test_start_of_a_is_he_uniform_with_slope_root_five():
    # Bound of the uniform distribution: sqrt(2 / (1 + 5)) · sqrt(3 / fan_in), fan_in = in_channels.
    values = LoRADense(300, 300, 100, 1).mindpet_delta_lora_a.asnumpy()
    assert np.abs(values).max() == pytest.approx(1 / math.sqrt(300), rel=1e-2)
    assert values.std() == pytest.approx(1 / math.sqrt(900), rel=2e-2)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
def test_start_of_a_is_what_mindspores_initializer_draws(dtype):
    dense = nn.Dense(6, 5)
    ms.set_seed(3)
    layer = LoRADense.from_dense(dense, 4, 4, param_init_type=dtype)
    ms.set_seed(3)
    wanted = initializer(HeUniform(negative_slope=math.sqrt(5)), (4, 6), dtype).init_data()
    np.testing.assert_array_equal(layer.mindpet_delta_lora_a.asnumpy(), wanted.asnumpy())
    assert layer.mindpet_delta_lora_a.dtype == dtype


def test_no_dropout_operator_at_zero_and_the_right_share_otherwise(mode):
    layer = LoRADense(64, 64, 64, 64, 0.25, "ones", "ones", weight_init="zeros", has_bias=False).set_train()
    y = layer(Tensor(np.ones((2000, 64), np.float32))).asnumpy() / 64
    # Each kept input counts 1 / (1 - p).
    assert y.mean() == pytest.approx(64, rel=1e-2)
    kept = y[:, 0] * 0.75
    assert np.allclose(kept, np.round(kept), atol=1e-3) and 24 < kept.min() < 48 < kept.max() <= 64
    layer.set_train(False)
    assert np.all(layer(Tensor(np.ones((3, 64), np.float32))).asnumpy() == 64 * 64)
    always = LoRADense(6, 4, 2, 4, 0).set_train()
    randomise(always)
    np.testing.assert_allclose(always(inputs(3, 6)).asnumpy(), expected(always, inputs(3, 6)), **TOLERANCE[ms.float32])


def test_dropout_is_on_the_input_of_a_only(mode):
    layer = LoRADense(6, 4, 2, 4, 0.9).set_train()
    plain = LoRADense.from_dense(layer.plain_cell(), 2, 4)
    assert np.array_equal(layer(inputs(5, 6)).asnumpy(), plain(inputs(5, 6)).asnumpy())


# Shapes and types

@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 6), (2, 3, 6), (1, 2, 1, 2, 6)])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_any_number_of_leading_axes(shape, activation, mode):
    layer = LoRADense(6, 4, 2, 3, activation=activation)
    randomise(layer)
    y = layer(inputs(*shape))
    assert y.shape == shape[:-1] + (4,)
    np.testing.assert_allclose(y.asnumpy(), expected(layer, inputs(*shape), activation), **TOLERANCE[ms.float32])


@pytest.mark.parametrize("input_type", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("compute_dtype", [None, ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("to_float", [None, ms.float32, ms.float16], ids=str)
def test_output_type_is_what_to_float_set_else_the_input_type(input_type, compute_dtype, to_float, mode):
    layer = LoRADense(6, 4, 2, 3, compute_dtype=compute_dtype)
    if to_float is not None:
        assert layer.to_float(to_float) is layer
    randomise(layer)
    y = layer(inputs(5, 6, dtype=input_type))
    assert y.dtype == (to_float or input_type)
    computes_in = compute_dtype or to_float or ms.float32
    rough = ms.float16 in (computes_in, input_type, to_float)
    np.testing.assert_allclose(numbers(y), expected(layer, inputs(5, 6, dtype=input_type)),
                               **TOLERANCE[ms.float16 if rough else ms.float32])
    if computes_in == ms.float16 and y.dtype == ms.float32:
        assert np.array_equal(y.asnumpy(), y.asnumpy().astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("weight_type", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("delta_type", [ms.float32, ms.float16], ids=str)
def test_default_compute_type_is_the_weights_own(weight_type, delta_type, mode):
    layer = LoRADense(6, 4, 2, 3, param_init_type=delta_type, dtype=weight_type)
    randomise(layer)
    assert layer.mindpet_delta_lora_b.dtype == delta_type
    y = layer(inputs(5, 6))
    assert y.dtype == ms.float32
    is_fp16 = np.array_equal(y.asnumpy(), y.asnumpy().astype(np.float16).astype(np.float32))
    assert is_fp16 == (weight_type == ms.float16)
    np.testing.assert_allclose(y.asnumpy(), expected(layer, inputs(5, 6)), **TOLERANCE[weight_type])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("compute_dtype", [None, ms.float32, ms.float16], ids=str)
def test_to_float_of_an_outer_net(when, compute_dtype, mode):
    net = nn.SequentialCell(nn.Dense(6, 6, activation="relu"), nn.Dense(6, 4))
    if when == "before":
        net.to_float(ms.float16)
    base = net(inputs(5, 6)) if when == "before" else None
    mp.get_pet_model(net, config(["0"], compute_dtype=compute_dtype))
    if when == "after":
        net.to_float(ms.float16)
    y = net(inputs(5, 6))
    assert y.dtype == ms.float16
    if base is not None:
        assert compute_dtype == ms.float32 or np.array_equal(y.asnumpy(), base.asnumpy())
        np.testing.assert_allclose(y.asnumpy(), base.asnumpy(), rtol=2e-3, atol=2e-3)
    randomise(net)
    y = numbers(net(inputs(5, 6)))
    hidden = expected(net[0], inputs(5, 6), "relu")
    np.testing.assert_allclose(y, hidden @ numbers(net[1].weight).T + numbers(net[1].bias), **TOLERANCE[ms.float16])
    mp.merge(net)
    np.testing.assert_allclose(numbers(net(inputs(5, 6))), y, rtol=1e-2, atol=1e-2)
    assert isinstance(net[0], nn.Dense) and (compute_dtype is not None or type(net[0]) is nn.Dense)
    mp.unmerge(net)
    assert np.array_equal(numbers(net(inputs(5, 6))), y)


# Like layers in one net: MindSpore may share the graph of cells it takes for equal.

def test_layers_that_differ_in_settings_only_compute_their_own(mode):
    class Three(nn.Cell):
        def __init__(self):
            super().__init__()
            self.a = LoRADense(6, 6, 2, 4)
            self.b = LoRADense(6, 6, 2, 8, compute_dtype=ms.float16)
            self.c = LoRADense(6, 6, 2, 4, 0.5)

        def construct(self, x):
            return self.a(x), self.b(x), self.c(x)

    net = Three().set_train()
    randomise(net)
    a, b, c = net(inputs(5, 6))
    np.testing.assert_allclose(a.asnumpy(), expected(net.a, inputs(5, 6)), **TOLERANCE[ms.float32])
    assert np.array_equal(b.asnumpy(), b.asnumpy().astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(b.asnumpy(), expected(net.b, inputs(5, 6)), **TOLERANCE[ms.float16])
    assert not np.allclose(c.asnumpy(), expected(net.c, inputs(5, 6)), atol=1e-3)


# from_dense

class Doubled(nn.Cell):
    """An activation of the user's own."""

    def construct(self, x):
        return 2 * x


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "leakyrelu", "prelu", nn.Tanh(), Doubled(), ops.ReLU(),
                                        nn.PReLU(4)], ids=lambda item: item if isinstance(item, str) else
                         type(item).__name__)
@pytest.mark.parametrize("has_bias", [True, False])
def test_from_dense_is_the_dense_bit_for_bit(activation, has_bias, mode):
    box = nn.SequentialCell(nn.Dense(6, 4, has_bias=has_bias, activation=copy.deepcopy(activation)))
    dense = box[0]
    base, names = dense(inputs(5, 6)).asnumpy(), [item.name for item in dense.get_parameters()]
    layer = LoRADense.from_dense(dense, lora_rank=2, lora_alpha=4)
    assert isinstance(layer, LoRADense) and isinstance(layer, nn.Dense)
    assert layer.weight is dense.weight and layer.bias is dense.bias and layer.activation is dense.activation
    assert [item.name for item in dense.get_parameters()] == names
    assert [item.name for item in base_parameters(layer)] == names
    assert layer.mindpet_delta_lora_a.name == "0.mindpet_delta_lora_a"
    assert np.array_equal(layer(inputs(5, 6)).asnumpy(), base)
    assert np.array_equal(dense(inputs(5, 6)).asnumpy(), base)
    randomise(layer)
    assert not np.allclose(layer(inputs(5, 6)).asnumpy(), base)


def test_from_dense_adds_the_update_before_the_activation(mode):
    layer = LoRADense.from_dense(nn.Dense(6, 4, activation="tanh"), 2, 4)
    randomise(layer)
    np.testing.assert_allclose(layer(inputs(5, 6)).asnumpy(), expected(layer, inputs(5, 6), "tanh"),
                               **TOLERANCE[ms.float32])


@pytest.mark.parametrize("input_type", [ms.float32, ms.float16], ids=str)
def test_from_dense_of_a_half_precision_dense(input_type, mode):
    dense = nn.Dense(6, 4).to_float(ms.float16)
    base = numbers(dense(inputs(5, 6, dtype=input_type)))
    layer = LoRADense.from_dense(dense, 2, 4)
    y = layer(inputs(5, 6, dtype=input_type))
    assert y.dtype == ms.float16 and np.array_equal(numbers(y), base)


def test_from_dense_keeps_the_training_state():
    assert LoRADense.from_dense(nn.Dense(6, 4).set_train(), 2, 4).training
    assert not LoRADense.from_dense(nn.Dense(6, 4).set_train(False), 2, 4).training


def test_from_dense_takes_all_settings():
    layer = LoRADense.from_dense(nn.Dense(6, 4), 2, 4, lora_dropout=0.5, lora_a_init="ones", lora_b_init="ones",
                                 param_init_type=ms.float16, compute_dtype=ms.float16)
    assert layer.lora_dropout.p == 0.5 and layer.compute_dtype == ms.float16
    for parameter in (layer.mindpet_delta_lora_a, layer.mindpet_delta_lora_b):
        assert parameter.dtype == ms.float16 and np.all(parameter.asnumpy() == 1)


def test_from_dense_takes_over_sharding():
    dense = nn.Dense(6, 4)
    dense.matmul.shard(((2, 4), (1, 4)))
    layer = LoRADense.from_dense(dense, 2, 4)
    assert layer.matmul.in_strategy == ((2, 4), (1, 4))
    assert layer.lora_a_matmul.in_strategy == ((2, 4), (1, 4))
    assert layer.lora_b_matmul.in_strategy == ((2, 1), (1, 1))


class Scaled(nn.Dense):
    def construct(self, x):
        return 2 * super().construct(x)


class OwnBackward(nn.Dense):
    def bprop(self, x, out, dout):
        return (dout,)


class OnlyMore(nn.Dense):
    """A subclass that computes what nn.Dense does."""

    def __init__(self):
        super().__init__(6, 4)


@pytest.mark.parametrize("dense, reason", [
    (Scaled(6, 4), "Scaled overrides nn.Dense.construct"), (OwnBackward(6, 4), "OwnBackward overrides nn.Dense.bprop"),
    (nn.LayerNorm((6,)), "not LayerNorm"), (LoRADense(6, 4, 2, 4), "adapted already"), ("dense", "not str"),
    (None, "not NoneType")])
def test_from_dense_refuses_with_a_reason(dense, reason):
    with pytest.raises(TypeError, match=reason):
        LoRADense.from_dense(dense, 2, 4)


def test_from_dense_refuses_a_dense_whose_construct_was_replaced():
    dense = nn.Dense(6, 4)
    dense.construct = lambda x: x
    with pytest.raises(TypeError, match="overrides nn.Dense.construct"):
        LoRADense.from_dense(dense, 2, 4)


def test_from_dense_accepts_a_subclass_with_nn_denses_construct(pynative_mode):
    dense = OnlyMore()
    assert np.array_equal(LoRADense.from_dense(dense, 2, 4)(inputs(5, 6)).asnumpy(), dense(inputs(5, 6)).asnumpy())


# Validation

BAD = [
    ({"lora_rank": True}, TypeError, "lora_rank.*True"), ({"lora_rank": 2.0}, TypeError, "lora_rank.*2.0"),
    ({"lora_rank": "2"}, TypeError, "lora_rank.*without quotes"), ({"lora_rank": None}, TypeError, "lora_rank"),
    ({"lora_rank": 0}, ValueError, "lora_rank.*0"), ({"lora_rank": -1}, ValueError, "lora_rank.*-1"),
    ({"lora_alpha": True}, TypeError, "lora_alpha"), ({"lora_alpha": "1e-5"}, TypeError, "lora_alpha.*YAML"),
    ({"lora_alpha": None}, TypeError, "lora_alpha"), ({"lora_alpha": 1j}, TypeError, "lora_alpha"),
    ({"lora_alpha": 0}, ValueError, "lora_alpha"), ({"lora_alpha": -1.0}, ValueError, "lora_alpha"),
    ({"lora_alpha": math.nan}, ValueError, "lora_alpha.*nan"), ({"lora_alpha": math.inf}, ValueError, "lora_alpha"),
    ({"lora_alpha": -math.inf}, ValueError, "lora_alpha"),
    ({"lora_dropout": 1}, ValueError, "lora_dropout"), ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
    ({"lora_dropout": -0.1}, ValueError, "lora_dropout"), ({"lora_dropout": math.nan}, ValueError, "lora_dropout"),
    ({"lora_dropout": math.inf}, ValueError, "lora_dropout"), ({"lora_dropout": "0.1"}, TypeError, "lora_dropout"),
    ({"lora_dropout": True}, TypeError, "lora_dropout"), ({"lora_dropout": None}, TypeError, "lora_dropout"),
    ({"lora_a_init": Tensor(np.zeros((6, 2), np.float32))}, ValueError, r"lora_a_init.*\(2, 6\).*\(6, 2\)"),
    ({"lora_b_init": Tensor(np.zeros((2, 4), np.float32))}, ValueError, r"lora_b_init.*\(4, 2\).*\(2, 4\)"),
    ({"lora_a_init": Tensor(np.zeros((12,), np.float32))}, ValueError, "lora_a_init"),
    ({"lora_a_init": "normall"}, ValueError, "normall.*normal"), ({"lora_b_init": [0.0]}, TypeError, "lora_b_init"),
    ({"lora_a_init": None}, TypeError, "lora_a_init"), ({"lora_b_init": True}, TypeError, "lora_b_init"),
    ({"param_init_type": ms.int32}, TypeError, "param_init_type"),
    ({"param_init_type": ms.float64}, TypeError, "param_init_type.*float16, bfloat16 or float32"),
    ({"param_init_type": None}, TypeError, "param_init_type"), ({"param_init_type": "float16"}, TypeError, "param_in"),
    ({"compute_dtype": ms.int8}, TypeError, "compute_dtype"), ({"compute_dtype": "fp16"}, TypeError, "compute_dtype"),
]


@pytest.mark.parametrize("build", [
    lambda **fields: LoRADense(6, 4, **fields), lambda **fields: LoRADense.from_dense(nn.Dense(6, 4), **fields),
    lambda **fields: mp.get_pet_model(nn.SequentialCell(nn.Dense(6, 4)),
                                      mp.LoraConfig(**fields, target_modules=["0"]))],
    ids=["class", "from_dense", "config"])
@pytest.mark.parametrize("fields, error, text", BAD, ids=lambda item: str(item)[:40])
def test_validation(build, fields, error, text):
    fields = {"lora_rank": 2, "lora_alpha": 4, **fields}
    with pytest.raises(error, match=text):
        build(**fields)


@pytest.mark.parametrize("fields", [
    {"lora_dropout": 0}, {"lora_dropout": 0.999}, {"lora_alpha": 1e-5}, {"lora_alpha": np.float32(2)},
    {"lora_rank": np.int64(2)}, {"lora_rank": 4}, {"param_init_type": ms.bfloat16}, {"compute_dtype": ms.bfloat16},
    {"lora_a_init": "xavier_uniform"}, {"lora_a_init": 0.5}, {"lora_b_init": HeUniform()}])
def test_valid_settings_pass_without_a_warning(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRADense(6, 4, **{"lora_rank": 2, "lora_alpha": 4, **fields})


def test_tensor_inits_are_copied_and_cast(mode):
    a = Tensor(np.arange(12).reshape(2, 6), ms.float16)
    first, second = (LoRADense(6, 4, 2, 4, lora_a_init=a, lora_b_init=initializer("ones", (4, 2))) for _ in range(2))
    assert first.mindpet_delta_lora_a.dtype == ms.float32
    assert np.array_equal(first.mindpet_delta_lora_a.asnumpy(), np.arange(12).reshape(2, 6))
    assert np.all(first.mindpet_delta_lora_b.asnumpy() == 1)
    ops.assign(first.mindpet_delta_lora_a, Tensor(np.zeros((2, 6), np.float32)))
    assert np.array_equal(second.mindpet_delta_lora_a.asnumpy(), a.asnumpy())
    given = Parameter(Tensor(np.ones((2, 6), np.float32)), name="given")
    assert LoRADense(6, 4, 2, 4, lora_a_init=given).mindpet_delta_lora_a is not given and given.name == "given"


def test_rank_above_both_sizes_warns_at_the_users_line():
    for build in (lambda: LoRADense(6, 4, 5, 4), lambda: LoRADense.from_dense(nn.Dense(6, 4), 5, 4),
                  lambda: mp.get_pet_model(Attention(4), config(["to_q"], lora_rank=5))):
        with pytest.warns(UserWarning, match="lora_rank 5 .*= 4") as caught:
            build()
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("name, near", [("rellu", "relu"), ("geluu", "gelu"), ("leaky_relu", "leakyrelu")])
def test_an_unknown_activation_lists_near_names(name, near):
    with pytest.raises(ValueError, match=f"{name}.*{near}"):
        LoRADense(6, 4, 2, 4, activation=name)


def test_an_activation_of_the_wrong_kind_is_a_type_error():
    with pytest.raises(TypeError):
        LoRADense(6, 4, 2, 4, activation=3)


# Sharding

STRATEGIES = {
    "strategy_org_dense_matmul": (((2, 4), (1, 4)), lambda layer: layer.matmul),
    "strategy_org_bias_add": (((2, 1), (1,)), lambda layer: layer.bias_add),
    # There is no dropout without a rate before `shard` is called.
    "strategy_lora_dropout": (((2, 1),), lambda layer: getattr(getattr(layer, "lora_dropout", None), "dropout", None)),
    "strategy_lora_a_matmul": (((2, 2), (1, 2)), lambda layer: layer.lora_a_matmul),
    "strategy_lora_b_matmul": (((2, 1), (4, 1)), lambda layer: layer.lora_b_matmul),
    "strategy_lora_mul": (((2, 1), ()), lambda layer: layer.mul),
    "strategy_lora_add": (((2, 4), (2, 4)), lambda layer: layer.add),
    "strategy_activation": (((2, 4),), lambda layer: layer.activation.relu),
}


def in_strategy(primitive):
    return getattr(primitive, "in_strategy", None)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_reaches_its_primitive(name):
    strategy, primitive = STRATEGIES[name]
    layer = LoRADense(8, 8, 4, 4, activation="relu")
    layer.shard(**{name: strategy})
    assert in_strategy(primitive(layer)) == strategy
    derived = {"strategy_lora_a_matmul", "strategy_lora_b_matmul"} if name == "strategy_org_dense_matmul" else set()
    for other, (_, find) in STRATEGIES.items():
        if other != name:
            assert (in_strategy(find(layer)) is not None) == (other in derived), other


def test_all_strategies_by_position():
    layer = LoRADense(8, 8, 4, 4, activation="relu")
    assert layer.shard(*[strategy for strategy, _ in STRATEGIES.values()]) is layer
    for strategy, find in STRATEGIES.values():
        assert in_strategy(find(layer)) == strategy


def test_a_strategy_is_one_layers_own_and_stays_when_another_is_set():
    layer, other = LoRADense(8, 8, 4, 4, activation="relu"), LoRADense(8, 8, 4, 4, activation="relu")
    for name, (strategy, _) in STRATEGIES.items():
        layer.shard(**{name: strategy})
    for name, (strategy, find) in STRATEGIES.items():
        assert in_strategy(find(layer)) == strategy, name
        assert in_strategy(find(other)) is None and in_strategy(find(LoRADense(8, 8, 4, 4, activation="relu"))) is None


def test_strategies_of_a_and_b_follow_the_dense_one():
    layer = LoRADense(8, 8, 4, 4)
    layer.shard(((2, 4), (8, 4)))
    assert in_strategy(layer.lora_a_matmul) == ((2, 4), (1, 4))
    assert in_strategy(layer.lora_b_matmul) == ((2, 1), (8, 1))


def test_a_primitive_as_activation_can_be_sharded():
    layer = LoRADense(8, 8, 4, 4, activation=ops.ReLU())
    layer.shard(strategy_activation=((2, 4),))
    assert in_strategy(layer.activation) == ((2, 4),)


@pytest.mark.parametrize("strategy", ["2,4", [(2, 4), (1, 4)], ((2, 4), 3), ((2.0, 4), (1, 4)), ((True, 4), (1, 4))])
def test_a_wrong_strategy_changes_nothing(strategy):
    layer = LoRADense(8, 8, 4, 4)
    with pytest.raises(TypeError, match="strategy_lora_add"):
        layer.shard(strategy_org_dense_matmul=((2, 4), (1, 4)), strategy_lora_add=strategy)
    assert in_strategy(layer.matmul) is None


@pytest.mark.parametrize(("activation", "kind"), [("logsoftmax", "LogSoftmax"), ("hardtanh", "Hardtanh")])
def test_a_strategy_for_an_activation_that_cannot_be_split_is_refused(activation, kind):
    layer = LoRADense(8, 8, 4, 4, activation=activation)
    with pytest.raises(ValueError, match=f"strategy_activation.*{kind}"):
        layer.shard(((2, 4), (1, 4)), strategy_activation=((2, 4),))
    assert in_strategy(layer.matmul) is None


def test_a_dense_strategy_needs_two_inputs():
    for strategy in (((2, 4),), ((2,), (1,)), ((2, 4), (1, 4), (1, 1))):
        with pytest.raises(ValueError, match="strategy_org_dense_matmul"):
            LoRADense(8, 8, 4, 4).shard(strategy)


# Live scale

def test_scale_and_switch_do_not_compile_again(graph_mode):
    net = Attention()
    mp.get_pet_model(net, config("all-linear"))
    base = net(inputs(5, 6)).asnumpy()
    randomise(net)
    full = net(inputs(5, 6)).asnumpy()
    with compile_count() as compiled:
        mp.set_lora_scale(net, 0)
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), base)
        mp.set_lora_scale(net, 1.0)
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), full)
        mp.set_lora_scale(net, 0.5)
        half = net(inputs(5, 6)).asnumpy()
        with mp.adapters_disabled(net):
            assert np.array_equal(net(inputs(5, 6)).asnumpy(), base)
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), half)
        assert not np.allclose(half, full) and not np.allclose(half, base)
        assert not compiled
        net(inputs(7, 6))
        assert len(compiled) == 1, "the counter must see a compile: another shape needs one"


def test_scale_of_a_training_step_does_not_compile_again(graph_mode):
    net = Attention()
    mp.get_pet_model(net, config(["to_q"]))
    randomise(net)
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.SGD(net.trainable_params(), 0.0)).set_train()
    # No dropout in the comparison.
    net.to_out.set_train(False)
    target = inputs(5, 6, seed=1)
    with compile_count() as compiled:
        losses = [step(inputs(5, 6), target).asnumpy()]
        assert len(compiled) == 1
        mp.set_lora_scale(net, 2)
        losses.append(step(inputs(5, 6), target).asnumpy())
        with mp.adapters_disabled(net):
            losses.append(step(inputs(5, 6), target).asnumpy())
        assert len(compiled) == 1 and len({float(loss) for loss in losses}) == 3


def test_scale_multiplies_the_update(mode):
    layer = LoRADense(6, 4, 2, 3)
    randomise(layer)
    for scale in (0.5, -1, 2, np.float32(0.25)):
        mp.set_lora_scale(layer, scale)
        np.testing.assert_allclose(layer(inputs(5, 6)).asnumpy(),
                                   expected(layer, inputs(5, 6), scale=float(scale) * 3 / 2), **TOLERANCE[ms.float32])


@pytest.mark.parametrize("scale, error", [("1", TypeError), (True, TypeError), (None, TypeError),
                                          (math.nan, ValueError), (math.inf, ValueError)])
def test_a_wrong_scale_is_refused(scale, error):
    layer = LoRADense(6, 4, 2, 3)
    with unchanged(layer), pytest.raises(error, match="scale"):
        mp.set_lora_scale(layer, scale)


@pytest.mark.parametrize("call", [lambda net: mp.set_lora_scale(net, 1),
                                  lambda net: mp.adapters_disabled(net).__enter__()])
def test_scale_and_switch_need_an_adapted_net(call):
    with pytest.raises(ValueError, match="no adapted layer"):
        call(nn.Dense(6, 4))
    with pytest.raises(TypeError, match="Cell"):
        call("net")


def test_disabling_nests_and_survives_exceptions(pynative_mode):
    net = Attention()
    mp.get_pet_model(net, config(["to_q", "to_k"]))
    base = net(inputs(5, 6)).asnumpy()
    randomise(net)
    full = net(inputs(5, 6)).asnumpy()
    with mp.adapters_disabled(net) as same:
        assert same is net
        with mp.adapters_disabled(net):
            assert np.array_equal(net(inputs(5, 6)).asnumpy(), base)
        with mp.adapters_disabled(net.to_q):
            pass
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), base)
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), full)
    with pytest.raises(RuntimeError, match="mine"), mp.adapters_disabled(net):
        raise RuntimeError("mine")
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), full)
    with mp.adapters_disabled(net), pytest.raises(ValueError, match="leave the block"):
        mp.set_lora_scale(net, 0.5)
    with mp.adapters_disabled(net), pytest.raises(ValueError, match="leave the block"):
        mp.merge(net)
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), full)


def test_a_delta_that_is_not_finite_cannot_be_switched_off(pynative_mode):
    layer = LoRADense(6, 4, 2, 3)
    layer.mindpet_delta_lora_b.set_data(Tensor(np.full((4, 2), np.nan, np.float32)))
    with unchanged(layer), pytest.raises(ValueError, match="mindpet_delta_lora_b holds NaN"):
        with mp.adapters_disabled(layer):
            pass
    with unchanged(layer), pytest.raises(ValueError, match="mindpet_delta_lora_b holds NaN"):
        mp.set_lora_scale(layer, 0)


# MindPet's files by name, and copies

def test_mindpets_checkpoint_loads_by_name(mode):
    net = nn.SequentialCell(LoRADense(6, 4, 2, 3))
    values = {"0.mindpet_delta_lora_a": np.ones((2, 6)), "0.mindpet_delta_lora_b": np.ones((4, 2))}
    ms.save_checkpoint([{"name": name, "data": Tensor(value, ms.float32)} for name, value in values.items()], "a.ckpt")
    ms.load_param_into_net(net, ms.load_checkpoint("a.ckpt"))
    assert all(np.all(item.asnumpy() == 1) for item in net.get_parameters() if "mindpet_delta" in item.name)


def test_a_deep_copy_is_a_net_of_its_own(mode):
    net = Attention()
    twin = copy.deepcopy(net)
    before = twin(inputs(5, 6)).asnumpy()
    mp.get_pet_model(twin, config("all-linear"))
    randomise(twin)
    full = twin(inputs(5, 6)).asnumpy()
    assert not np.allclose(full, before)
    other = copy.deepcopy(twin)
    assert other.to_q.plain_cell().weight is other.to_q.weight is not twin.to_q.weight
    mp.set_lora_scale(other, 0)
    assert np.array_equal(other(inputs(5, 6)).asnumpy(), before)
    assert np.array_equal(twin(inputs(5, 6)).asnumpy(), full)
    mp.set_lora_scale(other, 1)
    mp.merge(other)
    np.testing.assert_allclose(other(inputs(5, 6)).asnumpy(), full, rtol=1e-5, atol=1e-5)
    third = copy.deepcopy(other)
    mp.unmerge(third)
    assert np.array_equal(third(inputs(5, 6)).asnumpy(), full)
    assert type(other.to_q) is nn.Dense and np.array_equal(twin(inputs(5, 6)).asnumpy(), full)


def test_repr_names_rank_and_alpha():
    assert "lora_rank=2, lora_alpha=3" in repr(LoRADense(6, 4, 2, 3))


def test_a_compiled_gradient_function_sees_the_scale_and_what_is_loaded(mode):
    net = nn.SequentialCell(nn.Dense(4, 4))
    mp.get_pet_model(net, config(["0"]))
    randomise(net)
    x, parameters = inputs(2, 4), net.trainable_params()

    def loss(value):
        return (net(value) ** 2).mean()

    step = ms.value_and_grad(loss, None, parameters)
    mp.save_adapter(net, "adapter")
    full = float(step(x)[0].asnumpy())
    mp.set_lora_scale(net, 0.5)
    assert float(step(x)[0].asnumpy()) == pytest.approx(float(loss(x).asnumpy()), rel=1e-6) != full
    mp.set_lora_scale(net, 1)
    nn.SGD(parameters, 0.1)(step(x)[1])
    assert float(step(x)[0].asnumpy()) != full
    mp.load_adapter(net, "adapter")
    assert float(step(x)[0].asnumpy()) == full


@pytest.mark.parametrize("given, taken", [(((2, 4), ()), ((2, 4), ())), (((2, 3), ()), ((2, 1), ()))])
def test_the_scales_strategy_fits_the_rank(given, taken):
    layer = LoRADense(8, 12, 4, 4)
    layer.shard(strategy_lora_mul=given)
    assert in_strategy(layer.mul) == taken
