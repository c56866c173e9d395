"""The laws of the methods that change a layer's output, on every kind of linear layer, in both modes.

All kinds stand beside each other in one net, so that what a law needs is compiled once for them. What these methods
do on `nn.Dense`, with every setting and by hand, is in `test_laws.py`; here the output of each plain layer goes through
the same float64 references.
"""
from __future__ import annotations

import functools
import re

import cases_adapter
import cases_low_rank_adapter
import cases_prefix
import cases_ptuning2
import mindspore as ms
import numpy as np
import pytest
import reference_prefix
from conftest import MODES
from host_layers import ELSEWHERE, LAYERS
from mindspore import Tensor, nn, ops
from nets import compile_count, gradient_function, inputs, numbers, pynative, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import METHODS, Delta
from mindpet_lite.delta.dense import OutputConfig
from mindpet_lite.delta.hosts import HOSTS, QUANTISED, LinearHost
from mindpet_lite.delta.hosts.int8 import Int8Dense
from mindpet_lite.delta.hosts.mindformers import FormersVocabEmbedding
from mindpet_lite.graph.adapters import deltas

KINDS = tuple(host for host in LAYERS if host.is_linear)
# What differs between both adapters, and between both kinds of rows, is no matter of the layer before it.
FEW = (LinearHost, Int8Dense)
X = inputs(2, 3, 32)


def bottleneck(of_layer):
    return lambda layer, h, upstream: of_layer(layer.bottleneck, h, upstream)


def rows(parts_of):
    """Return the reference of a layer that puts rows before h; `parts_of` names what they are made of."""
    def compute(layer, h, upstream):
        parts = parts_of(layer)
        values = [numbers(item) for item in parts]
        prefix = values[0] if len(parts) == 1 else reference_prefix.mlp(*values)
        by_prefix, by_h = upstream[:, :len(prefix)].sum(0), upstream[:, len(prefix):]
        by = [by_prefix] if len(parts) == 1 else reference_prefix.mlp_gradients(*values[:4], by_prefix)
        before = np.broadcast_to(prefix, (len(h), *prefix.shape))
        return np.concatenate([before, h], 1), dict(zip(parts, by)), by_h
    return compute


# By the method: its settings; (layer, output of the plain layer, output gradient) -> output, {parameter: gradient} and
# the gradient by the plain layer's output, in float64; and the kinds that it is run on.
SETTINGS = {
    "adapter": ({"bottleneck_size": 3, "non_linearity": "tanh"}, bottleneck(cases_adapter.of_layer), KINDS),
    "low_rank_adapter": ({"reduction_factor": 2, "low_rank_size": 2}, bottleneck(cases_low_rank_adapter.of_layer), FEW),
    "prefixtuning": ({"prefix_token_num": 2, "embed_dim": 3, "mid_dim": 4, "dropout_rate": 0},
                     rows(cases_prefix.parts_of), KINDS),
    "ptuning2": ({"pre_seq_len": 2, "dropout_prob": 0}, rows(cases_ptuning2.parts_of), FEW),
}


class Beside(nn.Cell):
    """Layers beside each other, each for as much of the input as it takes."""

    def __init__(self, kinds):
        super().__init__()
        self.layers = nn.CellList([LAYERS[host][0]() for host in kinds])
        self.widths = tuple(LAYERS[host][1].shape[-1] for host in kinds)

    def construct(self, x):
        return ops.concat([layer(x[..., :width]) for layer, width in zip(self.layers, self.widths)], -1)


def plain_net(kinds):
    """Return a net with the same values every time."""
    net, rng = Beside(kinds), np.random.default_rng(0)
    for item in net.get_parameters():
        item.set_data(Tensor(0.3 * rng.standard_normal(item.shape).astype(np.float32)))
    for index, host in enumerate(kinds):
        if host in QUANTISED.values():
            mp.quantize_base(net, host.quantised_kind, [f"layers.{index}"])
    return net.set_train(False)


@functools.cache
def plain_output(kinds, mode):
    """Return what the plain layers make of the input, computed once for each mode."""
    assert ms.get_context("mode") == MODES[mode]
    return plain_net(kinds)(X).asnumpy()


def test_every_method_and_every_linear_host_has_its_line():
    assert set(SETTINGS) == {name for name, kind in METHODS.items() if issubclass(kind, OutputConfig)}
    others = set(ELSEWHERE) - {FormersVocabEmbedding}
    assert {*KINDS, *others} == {host for host in HOSTS if host.is_linear}
    assert all(set(METHODS[name].fits) == {*KINDS, *others} for name in SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_laws(name, mode, tmp_path):
    settings, reference, kinds = SETTINGS[name]
    config = METHODS[name](target_modules=r"layers\.\d+", **settings)
    net, before = plain_net(kinds), plain_output(kinds, mode)
    plain, base = list(net.layers), [(item.name, item) for item in net.get_parameters()]
    bytes_before = [item.asnumpy().tobytes() for _, item in base]
    mp.get_pet_model(net, config)
    found = list(deltas(net).values())
    for host, layer, old, delta in zip(kinds, net.layers, plain, found):
        assert delta is layer and isinstance(layer, Delta) and isinstance(layer, host.plain_type)
        assert layer.plain_cell() is old, "undone it is the very same layer"
        assert {key: item.shape for key, item in layer.delta_parameters().items()} == config.shapes(old)
    own = [item for delta in found for item in delta.delta_parameters().values()]
    assert {id(item) for item in net.trainable_params()} == {id(item) for item in own}
    now = {item.name: item for item in net.get_parameters()}
    assert len(now) == len(list(net.get_parameters())) and all(now[key] is item for key, item in base)
    start = net(X).asnumpy()
    added = start.shape[1] - before.shape[1]
    assert np.array_equal(start[:, added:], before) and (added > 0) == found[0].foldable, "starts as its base, exactly"

    rng = np.random.default_rng(1)
    for item in own:
        item.set_data(Tensor(0.3 * rng.standard_normal(item.shape).astype(np.float32)))
    upstream = rng.standard_normal(start.shape)
    y, by_x, by_own = gradient_function(net, own, X, upstream)()
    slopes = dict(zip(map(id, own), by_own))
    pieces = []
    for index, layer in enumerate(net.layers):
        part = slice(4 * index, 4 * index + 4)
        wanted, by, by_h = reference(layer, before[..., part].astype(np.float64), upstream[..., part])
        np.testing.assert_allclose(y.asnumpy()[..., part], wanted, rtol=1e-5, atol=1e-5)
        for parameter, value in by.items():
            np.testing.assert_allclose(slopes.pop(id(parameter)).asnumpy(), value, rtol=1e-4, atol=1e-5,
                                       err_msg=parameter.name)
        pieces.append(by_h)
    assert not slopes
    with pynative():
        wanted = gradient_function(plain_net(kinds), [], X, np.concatenate(pieces, -1))()[1]
    np.testing.assert_allclose(by_x.asnumpy(), wanted.asnumpy(), rtol=1e-4, atol=1e-4)

    full = net(X).asnumpy()
    if found[0].fixed:
        with unchanged(net), pytest.raises(ValueError, match=re.escape(f"layers.0: {found[0].fixed}")):
            mp.set_lora_scale(net, 0.5)
    else:
        with compile_count() as compiled:
            with mp.adapters_disabled(net):
                assert np.array_equal(net(X).asnumpy(), before), "switched off it is its base, exactly"
            mp.set_lora_scale(net, 0.5)
            np.testing.assert_allclose(net(X).asnumpy(), (before + full) / 2, rtol=1e-5, atol=1e-5)
            mp.set_lora_scale(net, 1)
            assert np.array_equal(net(X).asnumpy(), full) and not compiled
    mp.save_adapter(net, tmp_path / "adapter")
    fresh = mp.load_adapter(plain_net(kinds), tmp_path / "adapter")
    assert {item.name: item.asnumpy().tobytes() for item in fresh.get_parameters()} == {
        item.name: item.asnumpy().tobytes() for item in net.get_parameters()}, "the file rebuilds the net, exactly"
    with unchanged(net), pytest.raises(ValueError, match=re.escape(f"layers.0: {found[0].unmergeable}")):
        mp.merge(net)
    assert [item.asnumpy().tobytes() for _, item in base] == bytes_before


@pytest.mark.parametrize("name", SETTINGS)
def test_training_moves_the_delta_alone(name, pynative_mode):
    settings, _, kinds = SETTINGS[name]
    net = mp.get_pet_model(plain_net(kinds), METHODS[name](target_modules=r"layers\.\d+", **settings))
    before = {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}
    target = Tensor(np.zeros(net(X).shape, np.float32))
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-2)).set_train()
    losses = [float(step(X, target)) for _ in range(4)]
    assert losses[-1] < losses[0]
    moved = {item.name for item in net.get_parameters() if item.asnumpy().tobytes() != before[item.name]}
    assert moved == {item.name for item in net.trainable_params()}


def test_rows_from_an_mlp_are_folded_on_every_kind(pynative_mode):
    settings, _, kinds = SETTINGS["prefixtuning"]
    net = mp.get_pet_model(plain_net(kinds), mp.PrefixTuningConfig(target_modules=r"layers\.\d+", **settings))
    before = net(X).asnumpy()
    mp.fold_prefixes(net)
    assert len(net.trainable_params()) == len(kinds) and np.array_equal(net(X).asnumpy(), before)


@pytest.mark.parametrize("name", ["adapter", "ptuning2"])
def test_types_are_those_of_the_plain_layers(name, pynative_mode):
    settings, _, kinds = SETTINGS[name]
    net = mp.get_pet_model(plain_net(kinds), METHODS[name](target_modules=r"layers\.\d+", **settings))
    half, plain = net.to_float(ms.float16)(X), plain_net(kinds).to_float(ms.float16)(X)
    assert half.dtype == plain.dtype == ms.float16
    np.testing.assert_allclose(numbers(half)[:, -X.shape[1]:], numbers(plain), rtol=2e-3, atol=2e-3)
