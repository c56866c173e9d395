"""The 25 activations MindPet names: values and gradients, case, errors, how each is split."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import reference_adapter as reference
from mindspore import Parameter, Tensor, nn, ops
from nets import gradients_of, inputs, numbers

from mindpet_lite.delta.activation import (
    ACTIVATIONS,
    activation_strategies,
    as_activation,
    check_non_linearity,
    get_activation,
)

MINDPETS = ["softmin", "softmax", "softmax2d", "logsoftmax", "relu", "relu6", "rrelu", "silu", "tanh", "tanhshrink",
            "hardtanh", "gelu", "fast_gelu", "elu", "sigmoid", "softsign", "prelu", "leakyrelu", "hswish", "hsigmoid",
            "logsigmoid", "softshrink", "hshrink", "threshold", "mish"]
# The operator that MindPet splits, by its attribute in the cell.
SPLITTABLE = {"softmax": "softmax", "relu": "relu", "relu6": "relu6", "tanh": "tanh", "gelu": "gelu",
              "fast_gelu": "fast_gelu", "elu": "elu", "sigmoid": "sigmoid", "softsign": "softsign", "prelu": "prelu",
              "hswish": "hswish", "hsigmoid": "hsigmoid", "softshrink": "softshrink", "hshrink": "hshrink",
              "mish": "mish"}


def test_the_names_are_mindpets():
    assert list(ACTIVATIONS) == MINDPETS


# Beyond 3 the CPU kernels of tanh (to 1e-4) and of mish's gradient (to 1e-3) approximate.
@pytest.mark.parametrize("reach, atol", [(2.4, 2e-6), (7.1, 2e-3)])
@pytest.mark.parametrize("name", MINDPETS)
def test_every_activation_is_mindspores_and_equals_its_formula(name, reach, atol, mode):
    cell = get_activation(name)
    assert any(kind.__module__.startswith("mindspore.nn") for kind in type(cell).__mro__[:2])
    points = np.linspace(-reach, reach + 0.03, 90)
    x = Tensor(np.random.default_rng(0).permuted(points).reshape(3, 5, 6).astype(np.float32))
    weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    y, by_x, _ = gradients_of(cell, list(cell.trainable_params()) or [Parameter(Tensor(0.0))], x, weights)
    assert y.shape == x.shape and y.dtype == x.dtype
    np.testing.assert_allclose(numbers(y), reference.activate(name, numbers(x)), rtol=1e-5, atol=atol)
    expected = reference.pull_back(name, numbers(x), weights.astype(np.float64))
    np.testing.assert_allclose(numbers(by_x), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", MINDPETS)
def test_float16_stays_float16(name, mode):
    x = inputs(3, 5, 6, dtype=ms.float16)
    y = get_activation(name)(x)
    assert y.dtype == ms.float16
    np.testing.assert_allclose(numbers(y), reference.activate(name, numbers(x)), rtol=5e-3, atol=5e-3)


def test_rrelu_draws_its_slope_in_training_only(mode):
    x = Tensor(-np.ones((100, 100), np.float32))
    cell = get_activation("rrelu").set_train()
    drawn = -cell(x).asnumpy()
    assert not np.array_equal(drawn, -cell(x).asnumpy())
    assert 1 / 8 <= drawn.min() < 0.13 and 0.32 < drawn.max() <= 1 / 3 + 1e-6
    assert drawn.mean() == pytest.approx(reference.RRELU_MEAN, rel=1e-2)
    positive = Tensor(np.full((4, 4), 2.5, np.float32))
    assert np.array_equal(cell(positive).asnumpy(), positive.asnumpy())
    mean = cell.set_train(False)(x).asnumpy()
    assert np.all(mean == np.float32(-reference.RRELU_MEAN)) and np.array_equal(mean, cell(x).asnumpy())


def test_names_in_any_case_and_each_call_a_new_cell():
    assert isinstance(get_activation("GeLU"), nn.GELU) and isinstance(get_activation("LeakyReLU"), nn.LeakyReLU)
    assert get_activation("prelu") is not get_activation("prelu")
    assert get_activation(None) is None


def test_unknown_names_say_what_there_is():
    with pytest.raises(KeyError, match=r"layer: activation must be one of softmin, .*Did you mean 'gelu'"):
        get_activation("gellu", "layer")
    with pytest.raises(ValueError, match="mish"):
        get_activation(3)
    with pytest.raises(TypeError, match="non_linearity must be one of softmin.*'relu'"):
        check_non_linearity("rellu")
    for wrong in (None, 1, nn.ReLU()):
        with pytest.raises(TypeError):
            check_non_linearity(wrong)


def test_an_activation_argument_is_a_name_a_cell_a_primitive_or_none():
    cell, primitive = nn.ReLU(), ops.Tanh()
    assert as_activation(cell) is cell and as_activation(primitive) is primitive and as_activation(None) is None
    assert isinstance(as_activation("relu"), nn.ReLU)
    with pytest.raises(KeyError):
        as_activation("nothing")
    with pytest.raises(TypeError, match="got 1 of type int"):
        as_activation(1)


@pytest.mark.parametrize("name", MINDPETS)
def test_how_each_is_split(name):
    cell, strategy = get_activation(name), ((2, 1),)
    if name in SPLITTABLE:
        assert activation_strategies(cell, strategy) == [(getattr(cell, SPLITTABLE[name]), strategy)]
    elif name == "leakyrelu":
        assert activation_strategies(cell, strategy) == [(cell.select_op, ((2, 1), (2, 1)))]
    elif name == "logsigmoid":
        assert activation_strategies(cell, strategy) == [
            (cell.mul, ((2, 1), ())), (cell.exp, strategy), (cell.add, ((2, 1), ())), (cell.rec, strategy),
            (cell.log, strategy)]
    else:
        with pytest.raises(ValueError, match="LogSoftmax cannot be split" if name == "logsoftmax" else "one operator"):
            activation_strategies(cell, strategy)


def test_a_primitive_is_split_itself_and_an_empty_strategy_is_refused():
    primitive = ops.Tanh()
    assert activation_strategies(primitive, ((2, 1),)) == [(primitive, ((2, 1),))]
    for activation in (primitive, get_activation("leakyrelu")):
        with pytest.raises(ValueError, match="must split the input"):
            activation_strategies(activation, ())
