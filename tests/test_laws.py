"""The laws every method keeps, on every kind of cell it adapts, built by hand and injected, in both modes.

A new method is covered by a file ``cases_<method>.py`` with one `Case` for each kind of cell it adapts.
"""
from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from laws import Case, Net, delta_of, delta_parameters, layer_of, randomise_deltas
from mindspore import Tensor, nn
from nets import (
    MERGED,
    TOLERANCE,
    compile_count,
    gradient_function,
    gradients_of,
    load_values,
    numbers,
    pynative,
    shape_of,
    unchanged,
)
from safetensors.numpy import load_file

import mindpet_lite as mp
from mindpet_lite.delta import METHODS, Delta
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import put

MODE_IDS = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}
BY_FILE: list[list[Case]] = [importlib.import_module(path.stem).CASES
                             for path in sorted(Path(__file__).parent.glob("cases_*.py"))]
CASES = [case for cases in BY_FILE for case in cases]


def training_step(net: Net, shape: tuple[int, ...]) -> Callable[[Tensor], float]:
    """Return a step with Adam towards ones of the output's shape."""
    target = Tensor(np.ones(shape, np.float32))
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-2)).set_train()
    return lambda x: float(step(x, target).asnumpy())


def delta_is_left(net: Net) -> bool:
    return bool(net.trainable_params())


def random_like(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)



def name_of(value: object) -> str:
    return f"{value.method}, {value.name}" if isinstance(value, Case) else str(value)


# Every case is injected and computes in fp32; by hand, and in fp16, the first of each kind of cell.
FIRST = [cases[0] for cases in BY_FILE]
BUILDS = [(case, "injected") for case in CASES] + [(case, "by hand") for case in FIRST if case.by_hand is not None]
every_case = pytest.mark.parametrize("case", CASES, ids=name_of)
every_build = pytest.mark.parametrize(("case", "how"), BUILDS, ids=name_of)
every_type = pytest.mark.parametrize(("case", "how", "dtype"), [(*build, ms.float32) for build in BUILDS]
                                     + [(case, "injected", ms.float16) for case in FIRST], ids=name_of)


def test_every_method_has_cases():
    # The methods that are written on hosts are in `test_methods.py`.
    by_hand = {name for name, kind in METHODS.items() if not issubclass(kind, MethodConfig)}
    assert {case.method for case in CASES} == by_hand


@every_type
def test_1_starts_as_its_base_exactly(case, how, dtype, mode):
    plain, adapted = case.build(how, dtype)
    x = case.x(dtype)
    if not case.starts_as_base:
        assert "start" in type(layer_of(adapted)).__doc__, "a method that changes the output at the start says so"
        return
    ours, base = layer_of(adapted)(x).asnumpy(), layer_of(plain)(x).asnumpy()
    if dtype == ms.float32 or mode == "pynative" or case.rounds_in_fp16:
        assert np.array_equal(ours, base)
    else:
        np.testing.assert_allclose(ours, base, rtol=2e-3)
    if dtype == ms.float32 or mode == "pynative":
        assert np.array_equal(adapted(x).asnumpy(), plain(x).asnumpy())


@every_build
def test_2_only_its_own_parameters_train(case, how):
    _, adapted = case.build(how)
    assert {id(item) for item in adapted.trainable_params()} == {id(item) for item in delta_parameters(adapted)}


@every_type
def test_5_and_6_output_and_gradients_are_the_references(case, how, dtype, mode):
    _, adapted = case.build(how, dtype)
    randomise_deltas(adapted)
    layer, x = layer_of(adapted), case.x(dtype)
    weights = random_like(shape_of(layer, x), 2)
    expected, by_parameter, by_x = case.reference(layer, numbers(x), weights)
    for parameter in by_parameter:
        parameter.requires_grad = True
    y, found_x, found = gradients_of(layer, list(by_parameter), x, weights)
    if not case.adds_nothing:
        assert y.dtype == dtype, "the output has the type of the input"
    np.testing.assert_allclose(numbers(y), expected, **TOLERANCE[dtype])
    for name, value, wanted in [*([] if case.ids else [("x", found_x, by_x)]),
                                *((item.name, value, by_parameter[item]) for item, value in zip(by_parameter, found))]:
        scale = TOLERANCE[dtype]["atol"] * max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(numbers(value), wanted, rtol=TOLERANCE[dtype]["rtol"], atol=scale, err_msg=name)


@every_type
def test_7_and_8_merged_equals_adapted_and_unmerge_is_exact(case, how, dtype, mode):
    _, adapted = case.build(how, dtype)
    randomise_deltas(adapted)
    x = case.x(dtype)
    before = adapted(x).asnumpy()
    values = {item.name: item.asnumpy().tobytes() for item in adapted.get_parameters()}
    delta = delta_of(adapted)
    if delta.unmergeable:
        with unchanged(adapted), pytest.raises(ValueError, match=re.escape(f"box.0: {delta.unmergeable}")):
            mp.merge(adapted)
        return
    absorbing = list(delta.merged_value())
    mp.merge(adapted)
    np.testing.assert_allclose(adapted(x).asnumpy(), before, **MERGED[dtype])
    assert not any(item.asnumpy().tobytes() == values[item.name] for item in absorbing)
    assert not isinstance(layer_of(adapted), Delta) and not delta_is_left(adapted)
    mp.unmerge(adapted)
    assert {item.name: item.asnumpy().tobytes() for item in adapted.get_parameters()} == values
    assert np.array_equal(adapted(x).asnumpy(), before)


@every_build
def test_9_base_names_stay_and_all_names_are_unique(case, how):
    plain, adapted = case.build(how)
    names = [item.name for item in adapted.get_parameters()]
    assert len(set(names)) == len(names)
    base = [item.name for item in plain.get_parameters()]
    assert [name for name in names if name in base] == base
    delta = delta_of(adapted)
    own = {item.name for item in [*delta_parameters(adapted), *delta.setting_parameters().values()]}
    assert set(names) == {*base, *own}
    if delta.unmergeable:
        return
    mp.merge(adapted)
    assert [item.name for item in adapted.get_parameters()] == base


@every_case
def test_11_injection_after_a_first_call_is_visible(case, mode):
    net, _ = case.build("plain")
    base = net(case.x()).asnumpy()
    mp.get_pet_model(net, METHODS[case.method](target_modules=["box.0"], **case.settings))
    randomise_deltas(net)
    y = net(case.x()).asnumpy()
    assert y.shape != base.shape or not np.allclose(y, base)
    with pynative():
        hidden = case.x() if case.ids else net.head(case.x())
        expected, _, _ = case.reference(layer_of(net), numbers(hidden), np.ones(layer_of(net)(hidden).shape))
        expected = net.tail(Tensor(expected.astype(np.float32))).asnumpy()
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_12_the_output_has_the_type_of_the_input(case, mode):
    """An input of another type than the layer's; of the same type laws 5 and 6 say so."""
    _, adapted = case.build("injected")
    if case.adds_nothing:
        pytest.skip("the layer is the user's own, and so is the type of its output")
    # Ids have no type to go by: there it is the table's.
    assert layer_of(adapted)(case.x(ms.float16)).dtype == (ms.float32 if case.ids else ms.float16)


@every_build
def test_13_a_refused_call_leaves_the_net_untouched(case, how, tmp_path):
    _, adapted = case.build(how)
    randomise_deltas(adapted)
    kind = METHODS[case.method]
    refused = [
        lambda: mp.get_pet_model(adapted, kind(target_modules=["no_such_layer"], **case.settings)),
        lambda: mp.get_pet_model(adapted, kind(target_modules=["box.0", "nothing"], **case.settings)),
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
    if delta_of(adapted).unmergeable or not delta_of(adapted).merged_value():
        return
    broken = delta_parameters(adapted)[0]
    broken.set_data(Tensor(np.full(broken.shape, np.nan, np.float32)))
    with unchanged(adapted), pytest.raises(ValueError, match="NaN"):
        mp.merge(adapted)


@every_build
def test_15_switched_off_it_is_its_base_and_nothing_compiles_anew(case, how, mode):
    plain, adapted = case.build(how)
    randomise_deltas(adapted)
    delta = delta_of(adapted)
    if delta.fixed:
        # What trains base Parameters has no strength, but is switched off with their values.
        calls = [lambda: mp.set_lora_scale(adapted, 0.5), lambda: mp.adapters_disabled(adapted).__enter__()]
        for call in calls[:1] if case.adds_nothing else calls:
            with unchanged(adapted), pytest.raises(ValueError, match=re.escape(f"box.0: {delta.fixed}")):
                call()
        if not case.adds_nothing:
            return
    full = adapted(case.x()).asnumpy()
    with compile_count() as compiled:
        with mp.adapters_disabled(adapted):
            off = adapted(case.x()).asnumpy()
        if delta.fixed:
            assert np.array_equal(adapted(case.x()).asnumpy(), full) and not compiled
            assert np.array_equal(off, plain(case.x()).asnumpy()) and not np.allclose(off, full)
            return
        mp.set_lora_scale(adapted, 0.5)
        half = adapted(case.x()).asnumpy()
        mp.set_lora_scale(adapted, 1)
        assert np.array_equal(adapted(case.x()).asnumpy(), full)
    assert not compiled
    assert np.array_equal(off, plain(case.x()).asnumpy())
    assert not np.allclose(half, full) and not np.allclose(half, off)


@every_build
def test_3_4_10_14_and_16_training_is_the_same_in_both_modes_and_the_file_rebuilds_the_net(case, how, tmp_path):
    """What is compiled for one of these laws serves the others: gradients, a step of Adam, the net itself."""
    losses, gradients, before, x = {}, [], ms.get_context("mode"), case.x()
    start = [copy.deepcopy(net) for net in case.build(how)]
    shape = shape_of(start[1], x)
    for mode in MODE_IDS.values():
        ms.set_context(mode=mode)
        plain, adapted = case.build(how)
        load_values(plain, start[0])
        load_values(adapted, start[1])
        own = delta_parameters(adapted)
        step = training_step(adapted, shape)
        compute = gradient_function(adapted, own, x, random_like(shape, 4))

        first = [Tensor(item.asnumpy().copy()) for item in own]
        randomise_deltas(adapted)
        y, by_x, by_parameters = compute()
        gradients.append([value.asnumpy() for value in (y, by_x, *by_parameters) if value is not None])

        for item, value in zip(own, first):
            put(item, value)
        values = {item.name: item.asnumpy().tobytes() for item in adapted.get_parameters()}
        seen = [np.any(value.asnumpy()) for value in compute()[2]]
        losses[mode] = [step(x)]
        seen = [one or np.any(value.asnumpy()) for one, value in zip(seen, compute()[2])]
        assert all(seen), "each gets a gradient after at most one step"
        losses[mode] += [step(x) for _ in range(49)]
        moved = {item.name for item in adapted.get_parameters() if item.asnumpy().tobytes() != values[item.name]}
        assert moved == {item.name for item in own}, "frozen values are unmoved"

        adapted.set_train(False)
        mp.save_adapter(adapted, tmp_path / str(mode))
        stored = load_file(tmp_path / str(mode) / "adapter_model.safetensors")
        assert sum(value.size for value in stored.values()) == sum(item.size for item in own)
        mp.load_adapter(plain, tmp_path / str(mode))
        for ours, theirs in zip(delta_parameters(plain), own):
            assert ours.asnumpy().tobytes() == theirs.asnumpy().tobytes()
        assert np.array_equal(plain.set_train(False)(x).asnumpy(), adapted(x).asnumpy())
    ms.set_context(mode=before)
    for of_graph, of_pynative in zip(*gradients):
        np.testing.assert_allclose(of_graph, of_pynative, **TOLERANCE[ms.float32])
    assert losses[ms.GRAPH_MODE][-1] < losses[ms.GRAPH_MODE][0]
    np.testing.assert_allclose(losses[ms.GRAPH_MODE], losses[ms.PYNATIVE_MODE], rtol=1e-4)
