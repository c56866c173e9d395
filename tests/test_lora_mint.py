"""LoRA on mint.nn.Linear, Conv1d to Conv3d and Embedding.

The CPU has no kernels for the last four, so stand-ins of the same functions take the place of their operators.
"""
from __future__ import annotations

import inspect

import mindspore as ms
import numpy as np
import pytest
import reference_conv
from mindspore import Tensor, mint, nn, ops
from nets import MERGED, TOLERANCE, gradients_of, inputs, numbers, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import (
    LoRADense,
    LoRAEmbedding,
    LoRALinear,
    LoRAMintConv1d,
    LoRAMintConv2d,
    LoRAMintConv3d,
    LoRAMintEmbedding,
)
from mindpet_lite.graph.adapters import deltas

IDS = Tensor(np.array([[1, 3, 0], [6, 3, 5]], np.int32))
CONVS = [(LoRAMintConv1d, mint.nn.Conv1d, (7,)), (LoRAMintConv2d, mint.nn.Conv2d, (6, 7)),
         (LoRAMintConv3d, mint.nn.Conv3d, (3, 4, 5))]
every_conv = pytest.mark.parametrize("adapted, plain, space", CONVS, ids=["1d", "2d", "3d"])


class Holder(nn.Cell):
    """A net around one layer."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return self.layer(x)


def injected(plain: nn.Cell, **fields) -> Holder:
    return mp.get_pet_model(Holder(plain), mp.LoraConfig(**{"lora_rank": 2, "lora_alpha": 5, **fields},
                                                         target_modules=["layer"]))


# Linear

def test_signature():
    assert list(inspect.signature(LoRALinear).parameters) == [
        "in_features", "out_features", "lora_rank", "lora_alpha", "lora_dropout", "lora_a_init", "lora_b_init",
        "param_init_type", "compute_dtype", "use_rslora", "lora_bias", "linear_kwargs"]


def test_linear_is_lora_dense(mode):
    linear, dense = LoRALinear(6, 4, 2, 5), LoRADense(6, 4, 2, 5)
    randomise(linear)
    for name, parameter in dense.parameters_and_names():
        parameter.set_data(linear.parameters_dict()[name])
    for shape in ((6,), (3, 6), (2, 3, 6)):
        np.testing.assert_allclose(linear(inputs(*shape)).asnumpy(), dense(inputs(*shape)).asnumpy(),
                                   **TOLERANCE[ms.float32])
    assert isinstance(linear, mint.nn.Linear) and list(linear.delta_parameters()) == list(dense.delta_parameters())


@pytest.mark.parametrize("how", ["compute_dtype", "to_float"])
def test_linear_computes_in_the_type_asked_for_and_returns_what_the_dtype_rule_says(how, mode):
    layer = LoRALinear(6, 4, 2, 5, compute_dtype=ms.float16 if how == "compute_dtype" else None)
    randomise(layer)
    full = numbers(inputs(3, 6)) @ numbers(layer.weight).T + numbers(layer.bias)
    if how == "to_float":
        layer.to_float(ms.float16)
    mp.set_lora_scale(layer, 0)
    y = layer(inputs(3, 6))
    assert y.dtype == (ms.float32 if how == "compute_dtype" else ms.float16)
    assert layer(inputs(3, 6, dtype=ms.float16)).dtype == ms.float16
    assert 1e-6 < np.abs(numbers(y) - full).max() < 1e-2
    assert "Float16 on every call" in layer.cost()


def test_linear_drops_out_on_the_low_rank_path_in_training_only(mode):
    layer = LoRALinear(6, 4, 2, 5, 0.5)
    base = layer.plain_cell()(inputs(3, 6)).asnumpy()
    assert np.array_equal(layer.set_train()(inputs(3, 6)).asnumpy(), base)
    randomise(layer)
    still = layer.set_train(False)(inputs(3, 6)).asnumpy()
    assert not np.allclose(layer.set_train()(inputs(3, 6)).asnumpy(), still)


def test_all_linear_means_linear_too():
    net = nn.SequentialCell(nn.Dense(4, 4), mint.nn.Linear(4, 4), nn.Embedding(4, 4), mint.nn.Conv2d(4, 4, 1))
    mp.get_pet_model(net, mp.LoraConfig(target_modules="all-linear", lora_rank=2))
    assert {path: type(delta) for path, delta in deltas(net).items()} == {"0": LoRADense, "1": LoRALinear}


def test_linear_goes_through_pefts_files(tmp_path):
    net, fresh = (injected(mint.nn.Linear(6, 4, weight_init="ones", bias_init="ones")) for _ in range(2))
    randomise(net)
    mp.save_adapter(net, tmp_path)
    mp.load_adapter(fresh, tmp_path)
    assert np.array_equal(net(inputs(3, 6)).asnumpy(), fresh(inputs(3, 6)).asnumpy())


# Convolutions

def padded(x, widths, mode):
    """Stand in for mint's pad, which has no kernel on the CPU: `widths` from the last axis on."""
    pairs = list(zip(widths[::2], widths[1::2]))[::-1]
    pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    return Tensor(np.pad(x.asnumpy(), pairs, mode={"reflect": "reflect", "replicate": "edge",
                                                   "circular": "wrap"}[mode]))


def convolved(x, weight, bias, stride, padding, dilation, groups):
    """Stand in for mint's convolutions, in numpy."""
    pads = [(item, item) for item in padding] if not isinstance(padding, str) else [
        (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) if padding == "same" else (0, 0)
        for d, k in zip(dilation, weight.shape[2:])]
    batched = numbers(x) if x.ndim == weight.ndim else numbers(x)[None]
    full = reference_conv.without_groups(numbers(weight), groups, batched.shape[1])
    y = reference_conv.Convolution(batched, weight.shape[2:], stride, dilation, pads).forward(full)
    if bias is not None:
        y = y + numbers(bias).reshape(1, -1, *[1] * len(stride))
    return Tensor(y if x.ndim == weight.ndim else y[0], x.dtype)


@pytest.fixture
def standing_in(monkeypatch, pynative_mode):
    """Replace what the CPU lacks; numpy works in PyNative mode only."""
    import mindspore.mint.nn.layer.conv as layers
    monkeypatch.setattr(mint.nn.functional, "pad", padded)
    monkeypatch.setattr(layers, "pad_ext", padded)
    for dims in (1, 2, 3):
        for kind in ("ext", "padding"):
            monkeypatch.setattr(layers, f"conv{dims}d_{kind}_op", convolved)


@every_conv
@pytest.mark.parametrize("conv", [
    {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": "valid", "bias": False},
    {"padding": 1, "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "stride": 2},
    {"padding": "same", "padding_mode": "replicate"}, {"groups": 2, "dilation": 2}], ids=str)
@pytest.mark.parametrize("how", ["by hand", "injected"])
def test_conv_adds_the_low_rank_kernel(adapted, plain, space, conv, how, standing_in):
    layer = plain(4, 6, 2, **conv)
    if how == "by hand":
        net = Holder(adapted(4, 6, 2, 2, 5, **conv))
        layer.weight.set_data(net.layer.weight)
        if layer.bias is not None:
            layer.bias.set_data(net.layer.bias)
    else:
        net = injected(layer)
    assert isinstance(net.layer, adapted) and isinstance(net.layer, plain)
    for x in (inputs(2, 4, *space), inputs(4, *space)):
        assert np.array_equal(net(x).asnumpy(), layer(x).asnumpy())
    randomise(net)
    a, b = numbers(net.layer.mindpet_delta_lora_a), numbers(net.layer.mindpet_delta_lora_b)
    groups = conv.get("groups", 1)
    mixing = reference_conv.without_groups(b.reshape(6, -1), groups, 2)
    full = reference_conv.without_groups(numbers(layer.weight), groups, 4)
    wide = plain(4, 6, 2, **{**conv, "groups": 1})
    wide.weight.set_data(Tensor((full + 2.5 * (mixing @ a.reshape(2, -1)).reshape(full.shape)).astype(np.float32)))
    if wide.bias is not None:
        wide.bias.set_data(layer.bias)
    for x in (inputs(2, 4, *space), inputs(4, *space)):
        np.testing.assert_allclose(net(x).asnumpy(), wide(x).asnumpy(), rtol=1e-5, atol=1e-5)
    if groups > 1:
        with unchanged(net), pytest.raises(ValueError, match="with 2 groups"):
            mp.merge(net)
        return
    y = net(x).asnumpy()
    mp.merge(net)
    assert type(net.layer) is plain
    np.testing.assert_allclose(net(x).asnumpy(), y, **MERGED[ms.float32])


@every_conv
def test_conv_without_kernels_names_shapes_and_merge(adapted, plain, space):
    layer = plain(4, 6, 3, bias=False)
    before = numbers(layer.weight)
    net = injected(layer)
    assert [item.name for item in net.get_parameters()] == [
        "layer.weight", "layer.mindpet_delta_lora_a", "layer.mindpet_delta_lora_b", "layer.scaling"]
    randomise(net)
    a, b = numbers(net.layer.mindpet_delta_lora_a), numbers(net.layer.mindpet_delta_lora_b)
    assert a.shape == (2, 4, *[3] * len(space)) and b.shape == (6, 2, *[1] * len(space))
    mp.merge(net)
    assert net.layer is layer
    np.testing.assert_allclose(numbers(layer.weight), before + 2.5 * np.einsum(
        "or,r...->o...", b.reshape(6, 2), a), rtol=1e-6, atol=1e-6)


def test_conv_refusals():
    net = Holder(mint.nn.ConvTranspose2d(4, 6, 3))
    with unchanged(net), pytest.raises(ValueError, match="LoRA adapts nn.Dense, not ConvTranspose2d"):
        mp.get_pet_model(net, mp.LoraConfig(target_modules=["layer"]))
    with pytest.raises(ValueError, match="divisible by the 2 groups"):
        LoRAMintConv2d(4, 6, 3, 3, 5, groups=2)


def test_conv_on_this_machine(mode):
    """Run what `standing_in` replaces, where there are kernels."""
    x = inputs(1, 4, 5, 5)
    try:
        mint.nn.Conv2d(4, 6, 3)(x).asnumpy()
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"mint.nn.Conv2d itself has no kernel here ({type(error).__name__})")
    layer = LoRAMintConv2d(4, 6, 3, 2, 5)
    assert np.array_equal(layer(x).asnumpy(), layer.plain_cell()(x).asnumpy())


# Embedding

def looked_up(ids, weight, padding_idx=None, *rest):
    """Stand in for mint's embedding, which has no kernel on the CPU."""
    return ops.gather(weight, ids, 0)


@pytest.mark.parametrize("padding_idx", [None, 3, -4])
def test_embedding_is_that_of_nn(padding_idx, monkeypatch, mode):
    monkeypatch.setattr(mint.nn.functional, "embedding", looked_up)
    layer = LoRAMintEmbedding(7, 4, 2, 5, padding_idx=padding_idx)
    twin = LoRAEmbedding(7, 4, 2, 5, padding_idx=None if padding_idx is None else 3)
    randomise(layer)
    for theirs, ours in zip(twin.get_parameters(), layer.get_parameters()):
        theirs.set_data(ours)
    assert isinstance(layer, mint.nn.Embedding)
    assert np.array_equal(layer(IDS).asnumpy(), twin(IDS).asnumpy())
    weights = np.random.default_rng(0).standard_normal((2, 3, 4))
    gradients = [gradients_of(net, list(net.delta_parameters().values()), IDS, weights)[2] for net in (layer, twin)]
    for ours, theirs in zip(*gradients):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-6)
    assert bool(gradients[0][0].asnumpy()[:, 3].any()) == (padding_idx is None)


def test_embedding_without_kernels_names_shapes_and_merge():
    layer = mint.nn.Embedding(7, 4, padding_idx=3)
    before = numbers(layer.weight)
    net = injected(layer)
    assert isinstance(net.layer, LoRAMintEmbedding) and net.layer.weight is layer.weight
    assert [item.name for item in net.get_parameters()] == [
        "layer.weight", "layer.mindpet_delta_lora_embedding_a", "layer.mindpet_delta_lora_embedding_b",
        "layer.scaling"]
    randomise(net)
    a, b = (numbers(item) for item in net.layer.delta_parameters().values())
    mp.merge(net)
    assert net.layer is layer
    np.testing.assert_allclose(numbers(layer.weight), before + 2.5 * (b @ a).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings, message", [
    ({"max_norm": 1.0}, "max_norm=1.0, which rewrites the rows"),
    ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True, which scales")])
def test_embedding_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAMintEmbedding(7, 4, 2, 5, **settings)
    net = Holder(mint.nn.Embedding(7, 4, **settings))
    with unchanged(net), pytest.raises(ValueError, match=f"layer: .*{message}"):
        mp.get_pet_model(net, mp.LoraConfig(target_modules=["layer"], lora_rank=2))
    with pytest.raises(ValueError, match="lora_dropout"):
        LoRAMintEmbedding(7, 4, 2, 5, 0.1)
