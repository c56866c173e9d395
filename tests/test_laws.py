"""The laws every method keeps, on every kind of cell it adapts, built by hand and injected, in both modes.

A new method is covered by one line in `CASES` for each kind of cell.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import reference
from mindspore import Tensor, nn
from nets import MERGED, TOLERANCE, gradients_of, inputs, load_values, numbers, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import METHODS, LoRADense

MODE_IDS = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on one kind of cell.

    Args:
        method: its name in METHODS.
        plain: makes the plain layer of a given type.
        by_hand: makes the adapted layer of a given type.
        settings: what the config needs besides target_modules.
        x_shape: of the layer's input.
        reference: (layer, x, output gradient) -> float64 output, {parameter: gradient} and gradient by x.
        rounds_in_fp16: the plain layer rounds after each operator. The CPU backend computes what has no fp16 kernel in
            fp32, and in a graph of such operators it leaves out the roundings between them.
    """

    method: str
    name: str
    plain: Callable[[Any], nn.Cell]
    by_hand: Callable[[Any], nn.Cell]
    settings: dict
    x_shape: tuple[int, ...]
    reference: Callable
    rounds_in_fp16: bool = True


def lora_dense(activation):
    def compute(layer, x, output_gradient):
        parts = (numbers(layer.weight), numbers(layer.bias) if layer.has_bias else None,
                 numbers(layer.mindpet_delta_lora_a), numbers(layer.mindpet_delta_lora_b))
        found = reference.gradients(x, *parts, 5 / 3, output_gradient, activation)
        by = {layer.weight: found["weight"], layer.mindpet_delta_lora_a: found["a"],
              layer.mindpet_delta_lora_b: found["b"]}
        if layer.has_bias:
            by[layer.bias] = found["bias"]
        return reference.forward(x, *parts, 5 / 3, activation), by, found["x"]
    return compute


def dense_case(name, x_shape, activation=None, rounds_in_fp16=True, **dense):
    lora = {"lora_rank": 3, "lora_alpha": 5}
    return Case("lora", name, lambda dtype: nn.Dense(6, 4, activation=activation, dtype=dtype, **dense),
                lambda dtype: LoRADense(6, 4, **lora, activation=activation, dtype=dtype, **dense),
                lora, x_shape, lora_dense(activation), rounds_in_fp16)


CASES = [
    dense_case("dense", (5, 6)),
    dense_case("dense without bias, 4 axes", (2, 1, 3, 6), has_bias=False),
    dense_case("dense with tanh, 1 axis", (6,), activation="tanh", rounds_in_fp16=False),
    dense_case("dense with relu, 3 axes", (2, 3, 6), activation="relu"),
]


class Net(nn.Cell):
    """A layer between two frozen ones."""

    def __init__(self, layer: nn.Cell, dtype=ms.float32) -> None:
        super().__init__()
        self.head = nn.Dense(6, 6, dtype=dtype)
        self.box = nn.SequentialCell(layer)
        self.tail = nn.Dense(4, 3, dtype=dtype)

    def construct(self, x):
        return self.tail(self.box(self.head(x)))


def layer_of(net: Net) -> nn.Cell:
    return net.box[0]


def build(case: Case, how: str, dtype=ms.float32) -> tuple[Net, Net]:
    """Return the plain net and the adapted one with the same base values."""
    plain = Net(case.plain(dtype), dtype)
    if how == "by hand":
        adapted = Net(case.by_hand(dtype), dtype)
        load_values(adapted, plain)
        mp.freeze_delta(adapted, case.method)
    else:
        adapted = Net(case.plain(dtype), dtype)
        load_values(adapted, plain)
        mp.get_pet_model(adapted, METHODS[case.method](target_modules=["box.0"], **case.settings))
    return plain, adapted


def delta_parameters(net: Net) -> list:
    return list(layer_of(net).delta_parameters().values())


def net_input(case: Case) -> Tensor:
    return inputs(*case.x_shape)


def train(net: Net, case: Case, steps: int) -> None:
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-2)).set_train()
    for _ in range(steps):
        step(net_input(case), Tensor(np.ones(case.x_shape[:-1] + (3,), np.float32)))


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}, {case.name}")
every_build = pytest.mark.parametrize("how", ["by hand", "injected"])
every_type = pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=["fp32", "fp16"])


def test_every_method_has_cases():
    assert {case.method for case in CASES} == set(METHODS)


@every_case
@every_build
@every_type
def test_1_starts_as_its_base_exactly(case, how, dtype, mode):
    plain, adapted = build(case, how, dtype)
    x = inputs(*case.x_shape, dtype=dtype)
    ours, base = layer_of(adapted)(x).asnumpy(), layer_of(plain)(x).asnumpy()
    if dtype == ms.float32 or mode == "pynative" or case.rounds_in_fp16:
        assert np.array_equal(ours, base)
    else:
        np.testing.assert_allclose(ours, base, rtol=2e-3)
    if dtype == ms.float32 or mode == "pynative":
        assert np.array_equal(adapted(x).asnumpy(), plain(x).asnumpy())


@every_case
@every_build
def test_2_only_its_own_parameters_train(case, how):
    _, adapted = build(case, how)
    assert {id(item) for item in adapted.trainable_params()} == {id(item) for item in delta_parameters(adapted)}


@every_case
@every_build
def test_3_each_of_them_gets_a_gradient_after_at_most_one_step(case, how, mode):
    _, adapted = build(case, how)
    seen: dict[str, bool] = {}
    for _ in range(2):
        weights = np.random.default_rng(3).standard_normal(case.x_shape[:-1] + (3,))
        _, _, found = gradients_of(adapted, delta_parameters(adapted), net_input(case), weights)
        for parameter, gradient in zip(delta_parameters(adapted), found):
            seen[parameter.name] = seen.get(parameter.name, False) or bool(np.any(gradient.asnumpy()))
        train(adapted, case, 1)
    assert all(seen.values()), seen


@every_case
@every_build
def test_4_frozen_values_are_unmoved_by_training(case, how, mode):
    _, adapted = build(case, how)
    own = {id(item) for item in delta_parameters(adapted)}
    before = {item.name: item.asnumpy().tobytes() for item in adapted.get_parameters()}
    train(adapted, case, 3)
    moved = {item.name for item in adapted.get_parameters() if item.asnumpy().tobytes() != before[item.name]}
    assert moved == {item.name for item in adapted.get_parameters() if id(item) in own}


@every_case
@every_build
@every_type
def test_5_and_6_output_and_gradients_are_the_references(case, how, dtype, mode):
    _, adapted = build(case, how, dtype)
    randomise(adapted)
    layer, x = layer_of(adapted), inputs(*case.x_shape, dtype=dtype)
    weights = np.random.default_rng(2).standard_normal(case.x_shape[:-1] + (4,))
    expected, by_parameter, by_x = case.reference(layer, numbers(x), weights)
    for parameter in by_parameter:
        parameter.requires_grad = True
    y, found_x, found = gradients_of(layer, list(by_parameter), x, weights)
    np.testing.assert_allclose(numbers(y), expected, **TOLERANCE[dtype])
    for name, value, wanted in [("x", found_x, by_x),
                                *((item.name, value, by_parameter[item]) for item, value in zip(by_parameter, found))]:
        scale = TOLERANCE[dtype]["atol"] * max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(numbers(value), wanted, rtol=TOLERANCE[dtype]["rtol"], atol=scale, err_msg=name)


@every_case
@every_build
@every_type
def test_7_and_8_merged_equals_adapted_and_unmerge_is_exact(case, how, dtype, mode):
    _, adapted = build(case, how, dtype)
    randomise(adapted)
    x = inputs(*case.x_shape, dtype=dtype)
    before = adapted(x).asnumpy()
    values = {item.name: item.asnumpy().tobytes() for item in adapted.get_parameters()}
    mp.merge(adapted)
    np.testing.assert_allclose(adapted(x).asnumpy(), before, **MERGED[dtype])
    assert not any(item.name in values and item.asnumpy().tobytes() == values[item.name]
                   for item in adapted.get_parameters() if item.name == layer_of(adapted).weight.name)
    mp.unmerge(adapted)
    assert {item.name: item.asnumpy().tobytes() for item in adapted.get_parameters()} == values
    assert np.array_equal(adapted(x).asnumpy(), before)


@every_case
@every_build
def test_9_base_names_stay_and_all_names_are_unique(case, how):
    plain, adapted = build(case, how)
    names = [item.name for item in adapted.get_parameters()]
    assert len(set(names)) == len(names)
    base = [item.name for item in plain.get_parameters()]
    assert [name for name in names if name in base] == base
    own = {item.name for item in [*delta_parameters(adapted), *layer_of(adapted).live_parameters().values()]}
    assert set(names) == {*base, *own}
    mp.merge(adapted)
    assert [item.name for item in adapted.get_parameters()] == base


@every_case
@every_build
def test_10_files_keep_every_bit_and_make_a_fresh_net_the_same(case, how, mode, tmp_path):
    plain, adapted = build(case, how)
    randomise(adapted)
    mp.save_adapter(adapted, tmp_path / "adapter")
    mp.load_adapter(plain, tmp_path / "adapter")
    for ours, theirs in zip(delta_parameters(plain), delta_parameters(adapted)):
        assert ours.asnumpy().tobytes() == theirs.asnumpy().tobytes()
    assert np.array_equal(plain(net_input(case)).asnumpy(), adapted(net_input(case)).asnumpy())


@every_case
def test_11_injection_after_a_first_call_is_visible(case, mode):
    net, _ = build(case, "by hand")
    base = net(net_input(case)).asnumpy()
    mp.get_pet_model(net, METHODS[case.method](target_modules=["box.0"], **case.settings))
    randomise(net)
    y = net(net_input(case)).asnumpy()
    assert not np.allclose(y, base)
    hidden = net.head(net_input(case))
    expected, _, _ = case.reference(layer_of(net), numbers(hidden), np.ones(case.x_shape[:-1] + (4,)))
    expected = expected @ numbers(net.tail.weight).T + numbers(net.tail.bias)
    np.testing.assert_allclose(y, expected, **TOLERANCE[ms.float32])


@every_case
@every_build
@every_type
def test_12_the_output_has_the_type_of_the_input(case, how, dtype, mode):
    _, adapted = build(case, how)
    assert layer_of(adapted)(inputs(*case.x_shape, dtype=dtype)).dtype == dtype


@every_case
@every_build
def test_13_a_refused_call_leaves_the_net_untouched(case, how, tmp_path):
    _, adapted = build(case, how)
    randomise(adapted)
    kind = METHODS[case.method]
    refused = [
        lambda: mp.get_pet_model(adapted, kind(target_modules=["no_such_layer"], **case.settings)),
        lambda: mp.get_pet_model(adapted, kind(target_modules=["box.0", "tail"], **case.settings)),
        lambda: mp.get_pet_model(adapted, kind(target_modules=["tail"], freeze_exclude=["*nothing*"],
                                               **case.settings)),
        lambda: mp.freeze_delta(adapted, "no such mode"),
        lambda: mp.freeze_delta(adapted, case.method, include=["*"]),
        lambda: mp.freeze_modules(adapted, include=["tail.weight"], exclude=["*nothing*"]),
        lambda: mp.load_adapter(adapted, tmp_path),
        lambda: mp.unmerge(adapted),
        lambda: mp.set_lora_scale(adapted, float("nan")),
    ]
    for call in refused:
        with unchanged(adapted), pytest.raises((TypeError, ValueError, OSError)):
            call()
    broken = delta_parameters(adapted)[0]
    broken.set_data(Tensor(np.full(broken.shape, np.nan, np.float32)))
    with unchanged(adapted), pytest.raises(ValueError, match="NaN"):
        mp.merge(adapted)


@every_case
@every_build
def test_14_graph_equals_pynative(case, how):
    _, adapted = build(case, how)
    randomise(adapted)
    weights = np.random.default_rng(4).standard_normal(case.x_shape[:-1] + (3,))
    found = []
    before = ms.get_context("mode")
    for mode in MODE_IDS.values():
        ms.set_context(mode=mode)
        y, by_x, by_parameters = gradients_of(adapted, delta_parameters(adapted), net_input(case), weights)
        found.append([value.asnumpy() for value in (y, by_x, *by_parameters)])
    ms.set_context(mode=before)
    for graph, pynative in zip(*found):
        np.testing.assert_allclose(graph, pynative, **TOLERANCE[ms.float32])
