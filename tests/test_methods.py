"""The laws of the methods that are written on hosts: every method on every kind of host that it fits, in both modes.

What a law needs is compiled once for all of them. The numbers of `merged` (numpy) are what the operators must compute;
that they are those of the paper and of PEFT is for `test_peft_numbers.py` and each method's own tests.
"""
from __future__ import annotations

import copy
import functools

import mindspore as ms
import numpy as np
import pytest
from conftest import MODES
from host_layers import (
    ELSEWHERE,
    IN_GRAPHS_ALONE,
    LAYERS,
    SETTINGS,
    STARTS,
    WITHOUT_KERNELS,
    full_net,
    off_bound,
    plain_net,
)
from mindspore import Tensor, nn
from nets import compile_count, gradient_function, numbers, pynative, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import METHODS, Delta
from mindpet_lite.delta.hosts import HOSTS, QUANTISED, host_of
from mindpet_lite.delta.hosts.conv import Conv2dHost
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.hosts.embedding import EmbeddingHost
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import put
from mindpet_lite.graph.adapters import deltas

# What lengthens the sequence neither starts as its base nor is switched or merged: `test_virtual_tokens.py`.
HOSTED = {name: kind for name, kind in METHODS.items() if issubclass(kind, MethodConfig) and not kind.layer.fixed}


def is_run(name, host, index):
    """Tell whether the laws run: on every kind of layer for one entry, on one of each nature for all.

    What an entry changes is a method's own, whatever the layer: kinds of one nature differ in their operators alone.
    Quantised ones differ in how they make the weight, not in what a method does with it: all methods run on one of
    them, on the others one that takes the layer's own product, and one that takes the weight.
    """
    if host in QUANTISED.values():
        return index == 0 and (host is QUANTISED["nf4"] or name in ("ia3", "hira"))
    return index == 0 or host in (DenseHost, Conv2dHost, EmbeddingHost)


CASES = [(name, host, index) for name, kind in HOSTED.items() for host in kind.fits if host in LAYERS
         for index in range(len(SETTINGS.get(name, ()))) if is_run(name, host, index)]
IDS = [f"{name}{index or ''}-{host.plain_name}" for name, host, index in CASES]


def test_every_method_and_every_host_has_its_line():
    assert set(SETTINGS) == set(HOSTED) and {*LAYERS, *IN_GRAPHS_ALONE, *WITHOUT_KERNELS, *ELSEWHERE} == set(HOSTS)


@functools.cache
def plain_output(host, mode):
    """Return what the plain layer makes of its input, computed once for each mode."""
    assert ms.get_context("mode") == MODES[mode]
    return plain_net(host)(LAYERS[host][1]).asnumpy()


def adapted(name, host, index):
    net = plain_net(host)
    return mp.get_pet_model(net, HOSTED[name](target_modules=["box.0"], **SETTINGS[name][index]))


def delta_of(net):
    return deltas(net)["box.0"]


def randomise(net, seed=3):
    """Move all that trains, each value near where it started."""
    rng = np.random.default_rng(seed)
    for item in delta_of(net).delta_parameters().values():
        put(item, Tensor((item.asnumpy() + 0.3 * rng.standard_normal(item.shape)).astype(np.float32)))


def new_base(delta, values):
    """Return weight and bias for these values of what trains, in float64."""
    base = {key: value.astype(np.float64) for key, value in delta.base_numbers().items()}
    shared = {key: value.astype(np.float64) for key, value in delta.shared_numbers().items()}
    return {**base, **delta.merged(base, {**values, **shared}, delta.settings())}


def expected(delta, host, x, weights):
    """Return the output and the gradients by what trains, by way of the plain layer with the new weight and bias.

    The gradient by the weight is MindSpore's, of the plain layer; that of the weight by each trained value is a central
    difference in float64.
    """
    values = {key: numbers(item) for key, item in delta.delta_parameters().items()}
    with pynative():
        plain = full_net(host)
        layer = plain.box[0]
        host = host_of(layer)
        new = new_base(delta, values)
        parameters = {"weight": getattr(layer, host.base_names[0]),
                      **({"bias": getattr(layer, host.base_names[1])} if "bias" in new else {})}
        as_host = host.on(host, layer)
        for key, item in parameters.items():
            value = new[key].astype(np.float32)
            item.set_data(as_host.as_weight(value) if key == "weight" else Tensor(value))
            item.requires_grad = True
        y, _, found = gradient_function(plain, list(parameters.values()), x, weights)()
        for item, slope in zip(parameters.values(), found):
            item.set_data(slope)
        slopes = {key: value.astype(np.float64) for key, value in as_host.base_numbers().items()}
    gradients = {}
    for key, value in values.items():
        gradients[key] = np.zeros(value.shape)
        for at in np.ndindex(*value.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = value.copy()
                moved[at] += step
                ends.append(new_base(delta, {**values, key: moved}))
            gradients[key][at] = sum(np.sum(slopes[part] * (ends[0][part] - ends[1][part])) / 2e-5 for part in slopes)
    return y.asnumpy(), gradients


@pytest.mark.parametrize(("name", "host", "index"), CASES, ids=IDS)
def test_the_laws(name, host, index, mode, tmp_path):
    x = LAYERS[host][1]
    plain, net = plain_net(host), adapted(name, host, index)
    delta, before = delta_of(net), plain_output(host, mode)
    assert isinstance(net.box[0], host.plain_type) and isinstance(net.box[0], Delta)
    own = list(delta.delta_parameters().values())
    assert {id(item) for item in net.trainable_params()} == {id(item) for item in own}
    assert {key: item.shape for key, item in delta.delta_parameters().items()} == delta.shapes(plain.box[0],
                                                                                             delta.config)
    base = [item.name for item in plain.get_parameters()]
    names = [item.name for item in net.get_parameters()]
    assert [item for item in names if item in base] == base and len(set(names)) == len(names)
    start = net(x).asnumpy()
    off = off_bound(name, host) * np.abs(before).max()
    bound = STARTS.get((name, index), off_bound(name, host))
    if bound is None:
        assert np.isfinite(start).all()
    else:
        assert np.abs(start - before).max() <= bound * np.abs(before).max(), "starts as its base"

    randomise(net)
    weights = np.random.default_rng(4).standard_normal(before.shape)
    wanted, slopes = expected(delta, host, x, weights)
    y, _, found = gradient_function(net, own, x, weights)()
    np.testing.assert_allclose(y.asnumpy(), wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(wanted - before).max() > 1e-3
    for (key, slope), value in zip(slopes.items(), found):
        # Of float32 sums over the layer's numbers; the differences themselves are good to 1e-9.
        np.testing.assert_allclose(value.asnumpy(), slope, rtol=1e-4, atol=1e-4 * max(1, np.abs(slope).max()),
                                   err_msg=key)

    full = net(x).asnumpy()
    with compile_count() as compiled:
        with mp.adapters_disabled(net):
            assert np.abs(net(x).asnumpy() - before).max() <= off, "switched off it is its base, exactly"
        mp.set_lora_scale(net, 0.5)
        half = net(x).asnumpy()
        halves = delta.merged_value()
        mp.set_lora_scale(net, 1)
        assert np.array_equal(net(x).asnumpy(), full)
    assert not compiled
    assert not np.allclose(half, full) and not np.allclose(half, before)

    mp.save_adapter(net, tmp_path / "adapter")
    fresh = mp.load_adapter(plain_net(host), tmp_path / "adapter")
    assert np.array_equal(fresh(x).asnumpy(), full), "the file rebuilds the net, exactly"
    assert [item.asnumpy().tobytes() for item in delta_of(fresh).delta_parameters().values()] == [
        item.asnumpy().tobytes() for item in own]

    bytes_before = {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}
    absorbing = delta.merged_value()
    mp.merge(net)
    assert type(net.box[0]) is type(full_net(host).box[0])
    np.testing.assert_allclose(net(x).asnumpy(), full, rtol=1e-5, atol=1e-5)
    for parameter, value in absorbing.items():
        assert np.array_equal(parameter.asnumpy(), value.asnumpy())
    for parameter, value in halves.items():
        parameter.set_data(value)
    np.testing.assert_allclose(net(x).asnumpy(), half, rtol=1e-5, atol=1e-5)
    for parameter, value in absorbing.items():
        parameter.set_data(value)
    mp.unmerge(net)
    assert {item.name: item.asnumpy().tobytes() for item in net.get_parameters()} == bytes_before
    assert np.array_equal(net(x).asnumpy(), full)


@pytest.mark.parametrize("name", HOSTED)
def test_training_moves_only_the_delta_and_is_the_same_in_both_modes(name):
    host = HOSTED[name].fits[0]
    x, losses = LAYERS[host][1], []
    start = adapted(name, host, 0)
    values = {item.name: copy.deepcopy(item.asnumpy()) for item in start.get_parameters()}
    before = ms.get_context("mode")
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        net = adapted(name, host, 0)
        for item in net.get_parameters():
            if item.name in {one.name for one in net.trainable_params()}:
                put(item, Tensor(values[item.name]))
        target = Tensor(np.ones(plain_net(host)(x).shape, np.float32))
        optimizer = nn.Adam(net.trainable_params(), 1e-2)
        step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer).set_train()
        losses.append([float(step(x, target).asnumpy()) for _ in range(12)])
        moved = {item.name for item in net.get_parameters()
                 if not np.array_equal(item.asnumpy(), values[item.name])}
        assert moved == {item.name for item in net.trainable_params()}
    ms.set_context(mode=before)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", HOSTED)
def test_what_does_not_fit_is_refused_and_nothing_changes(name):
    kind = HOSTED[name]
    net = adapted(name, kind.fits[0], 0)
    with unchanged(net):
        for targets in (["box.0"], ["nothing"]):
            with pytest.raises(ValueError, match="adapted already|hits no"):
                mp.get_pet_model(net, kind(target_modules=targets, **SETTINGS[name][0]))
    for host in set(LAYERS) - set(kind.fits):
        plain = plain_net(host)
        with unchanged(plain), pytest.raises(ValueError, match="adapts"):
            mp.get_pet_model(plain, kind(target_modules=["box.0"], **SETTINGS[name][0]))
    with pytest.raises(TypeError, match="param_init_type"):
        kind(target_modules=["box.0"], param_init_type=ms.int32, **SETTINGS[name][0])
