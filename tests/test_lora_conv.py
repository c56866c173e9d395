"""LoRA on nn.Conv1d, Conv2d and Conv3d: what the laws do not ask; PEFT's numbers."""
from __future__ import annotations

import inspect

import mindspore as ms
import numpy as np
import pytest
from cases_lora_conv import reference_of
from mindspore import Tensor, nn
from mindspore.common.initializer import HeUniform
from nets import MERGED, TOLERANCE, inputs, numbers, randomise, shape_of, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRADense
from mindpet_lite.graph.adapters import deltas

KINDS = [(LoRAConv1d, nn.Conv1d, (7,)), (LoRAConv2d, nn.Conv2d, (6, 7)), (LoRAConv3d, nn.Conv3d, (3, 4, 5))]
every_kind = pytest.mark.parametrize("adapted, plain, space", KINDS, ids=["1d", "2d", "3d"])


class Holder(nn.Cell):
    """A net around one layer."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return self.layer(x)


def randomised(layer: nn.Cell) -> nn.Cell:
    randomise(layer)
    return layer


def injected(plain: nn.Cell, **fields) -> Holder:
    """Return a net around the layer with LoRA on it."""
    return mp.get_pet_model(Holder(plain), mp.LoraConfig(**{"lora_rank": 2, "lora_alpha": 5, **fields},
                                                         target_modules=["layer"]))


# Signature, names, shapes

@every_kind
def test_signature(adapted, plain, space):
    parameters = inspect.signature(adapted).parameters
    assert list(parameters) == ["in_channels", "out_channels", "kernel_size", "lora_rank", "lora_alpha",
                                "lora_dropout", "lora_a_init", "lora_b_init", "param_init_type", "compute_dtype",
                                "use_rslora", "lora_bias", "conv_kwargs"]
    assert isinstance(parameters["lora_a_init"].default, HeUniform)
    layer = adapted(4, 6, 3, 2, 8, 0.1, "ones", "zeros", ms.float16, ms.float32, stride=2, has_bias=True)
    assert isinstance(layer, plain) and layer.stride[-1] == 2 and layer.has_bias
    assert layer.settings() == {"lora_rank": 2, "lora_alpha": 8, "lora_dropout": 0.1}
    assert layer.compute_dtype == ms.float32 and layer.mindpet_delta_lora_a.dtype == ms.float16


@every_kind
def test_shapes_are_pefts_and_the_base_keeps_its_parameters(adapted, plain, space):
    layer = plain(4, 6, 3, has_bias=True)
    weight, bias = layer.weight, layer.bias
    net = injected(layer)
    assert isinstance(net.layer, adapted) and isinstance(net.layer, plain)
    assert net.layer.weight is weight and net.layer.bias is bias
    assert [item.name for item in net.get_parameters()] == [
        "layer.weight", "layer.bias", "layer.mindpet_delta_lora_a", "layer.mindpet_delta_lora_b", "layer.scaling"]
    assert net.layer.mindpet_delta_lora_a.shape == (2, 4, *[3] * len(space))
    assert net.layer.mindpet_delta_lora_b.shape == (6, 2, *[1] * len(space))
    assert not net.layer.mindpet_delta_lora_b.asnumpy().any() and net.layer.mindpet_delta_lora_a.asnumpy().any()
    assert "lora_rank=2" in repr(net) and "kernel_size" in repr(net)


# What it computes: stride, padding and dilation of every kind, groups

@every_kind
@pytest.mark.parametrize("conv", [
    {"pad_mode": "same", "stride": 2}, {"pad_mode": "same", "dilation": 2}, {"pad_mode": "valid", "dilation": 2},
    {"pad_mode": "pad", "padding": 2, "stride": 2, "dilation": 2}, {"pad_mode": "pad", "padding": 1, "group": 2}],
    ids=str)
def test_equals_the_reference(adapted, plain, space, conv, mode):
    if len(space) == 3:
        # The CPU's convolution of volumes looks at the last two axes' dilation only.
        conv = {**conv, "dilation": (1, conv.get("dilation", 1), conv.get("dilation", 1))}
    layer = randomised(adapted(4, 6, 2, lora_rank=2, lora_alpha=5, has_bias=True, **conv))
    x = inputs(2, 4, *space)
    y = layer(x).asnumpy()
    expected, _, _ = reference_of(layer, numbers(x), np.ones(y.shape))
    np.testing.assert_allclose(y, expected, **TOLERANCE[ms.float32])
    if "group" in conv:
        return
    net = Holder(layer)
    mp.merge(net)
    assert type(net.layer) is plain
    np.testing.assert_allclose(net(x).asnumpy(), y, **MERGED[ms.float32])


@pytest.mark.parametrize("conv, x_shape", [({"pad_mode": "pad", "padding": (1, 0, 2, 1, 0, 1)}, (1, 4, 3, 4, 4))])
def test_volumes_padded_differently_on_each_side(conv, x_shape, mode):
    layer = randomised(LoRAConv3d(4, 6, (2, 3, 2), lora_rank=2, lora_alpha=5, **conv))
    y = layer(inputs(*x_shape)).asnumpy()
    np.testing.assert_allclose(y, reference_of(layer, numbers(inputs(*x_shape)), np.ones(y.shape))[0],
                               **TOLERANCE[ms.float32])


def test_depthwise(mode):
    layer = randomised(LoRAConv2d(4, 8, 3, lora_rank=4, lora_alpha=10, group=4))
    x = inputs(1, 4, 5, 5)
    y = layer(x).asnumpy()
    assert layer.mindpet_delta_lora_b.shape == (8, 1, 1, 1)
    np.testing.assert_allclose(y, reference_of(layer, numbers(x), np.ones(y.shape))[0], **TOLERANCE[ms.float32])


@every_kind
def test_groups_do_not_merge_and_the_reason_is_true(adapted, plain, space):
    layer = randomised(adapted(4, 6, 2, lora_rank=2, lora_alpha=5, group=2))
    net = Holder(layer)
    with unchanged(net), pytest.raises(ValueError, match="layer: with 2 groups .* every input channel"):
        mp.merge(net)
    x = numbers(inputs(1, 4, *space))
    moved = x.copy()
    moved[:, 3] += 1
    # Channel 3 is of the second group, the first three outputs of the first.
    change = layer(Tensor(moved, ms.float32)) - layer(Tensor(x, ms.float32))
    assert np.abs(change.asnumpy()[:, :3]).max() > 0.1
    with pytest.raises(NotImplementedError, match="with 2 groups"):
        layer.merged_value()


@every_kind
def test_a_rank_that_the_groups_cannot_share_is_refused(adapted, plain, space):
    message = "lora_rank must be divisible by the 2 groups .* but got 3"
    with pytest.raises(ValueError, match=message):
        adapted(4, 6, 3, lora_rank=3, lora_alpha=5, group=2)
    net = Holder(plain(4, 6, 3, group=2))
    with unchanged(net), pytest.raises(ValueError, match=f"layer: {message}"):
        mp.get_pet_model(net, mp.LoraConfig(lora_rank=3, target_modules=["layer"]))


# Types, dropout

@every_kind
@pytest.mark.parametrize("how", ["compute_dtype", "to_float", "outer to_float"])
def test_computes_in_the_type_asked_for_and_returns_what_the_dtype_rule_says(adapted, plain, space, how, mode):
    layer = adapted(4, 6, 3, 2, 5, has_bias=True, **({"compute_dtype": ms.float16} if how == "compute_dtype" else {}))
    randomise(layer)
    net = Holder(layer)
    x = inputs(2, 4, *space)
    full = shape_of(net.layer.plain_cell(), x)
    if how == "to_float":
        layer.to_float(ms.float16)
    elif how == "outer to_float":
        net.to_float(ms.float16)
    y = layer(x)
    assert y.dtype == (ms.float32 if how == "compute_dtype" else ms.float16) and y.shape == full
    expected, _, _ = reference_of(layer, numbers(x), np.ones(y.shape))
    off = np.abs(numbers(y) - expected).max()
    assert 1e-5 < off < 2e-2 * np.abs(expected).max(), "it computed in float32, or not at all"
    assert layer(x.astype(ms.float16)).dtype == ms.float16
    assert layer.weight.dtype == ms.float32
    assert layer.cost() == "casts its Float32 weight to Float16 on every call"


def test_without_a_cast_there_is_no_cost():
    assert LoRAConv2d(4, 6, 3, 2, 5).cost() == ""


def test_dropout_is_on_the_low_rank_path_in_training_only(mode):
    layer = LoRAConv2d(4, 6, 3, 2, 5, lora_dropout=0.5)
    x = inputs(1, 4, 5, 5)
    base = layer.plain_cell()(x).asnumpy()
    layer.set_train()
    assert np.array_equal(layer(x).asnumpy(), base), "B is 0, and the base sees no dropout"
    randomise(layer)
    still = layer.set_train(False)(x).asnumpy()
    assert not np.allclose(layer.set_train()(x).asnumpy(), still)
    assert np.array_equal(layer.set_train(False)(x).asnumpy(), still)


# Refusals

class OwnConv(nn.Conv2d):
    def construct(self, x):
        return super().construct(x) * 2


class NamedConv(nn.Conv2d):
    """A subclass that computes what its base does."""


@pytest.mark.parametrize("cell, message", [
    (nn.Conv1dTranspose(4, 6, 3), "LoRA adapts nn.Dense, not Conv1dTranspose; besides Dense it knows .*nn.Conv2d"),
    (nn.Conv2dTranspose(4, 6, 3), "LoRA adapts nn.Dense, not Conv2dTranspose"),
    (nn.Conv3dTranspose(4, 6, 3), "LoRA adapts nn.Dense, not Conv3dTranspose"),
    (OwnConv(4, 6, 3), "OwnConv overrides nn.Conv2d.construct"),
    (LoRAConv2d(4, 6, 3, 2, 5), "a LoRAConv2d is adapted already"),
], ids=lambda item: type(item).__name__)
def test_what_is_no_plain_convolution_is_refused(cell, message):
    net = Holder(cell)
    with unchanged(net), pytest.raises(ValueError, match=f"layer: {message}"):
        mp.get_pet_model(net, mp.LoraConfig(target_modules=["layer"]))


def test_a_subclass_that_computes_the_same_is_adapted():
    assert isinstance(injected(NamedConv(4, 6, 3)).layer, LoRAConv2d)


def test_another_layout_is_refused():
    plain = nn.Conv2d(4, 6, 3)
    # MindSpore itself makes such a layer on a GPU only.
    plain.data_format = "NHWC"
    net = Holder(plain)
    with unchanged(net), pytest.raises(ValueError, match="layer: .*channels first.*'NHWC'"):
        mp.get_pet_model(net, mp.LoraConfig(target_modules=["layer"]))


@pytest.mark.parametrize("settings, error, message", [
    ({"lora_rank": 0}, ValueError, "lora_rank"), ({"lora_rank": True}, TypeError, "lora_rank"),
    ({"lora_alpha": -1}, ValueError, "lora_alpha"), ({"lora_dropout": 1}, ValueError, "lora_dropout"),
    ({"param_init_type": ms.int32}, TypeError, "param_init_type"), ({"compute_dtype": ms.int8}, TypeError, "compute"),
    ({"lora_a_init": Tensor(np.zeros((2, 4), np.float32))}, ValueError, r"lora_a_init.*\(2, 4, 3, 3\).*\(2, 4\)"),
    ({"lora_b_init": "zerros"}, ValueError, "zerros.*zeros"), ({"kernel": 3}, TypeError, "kernel")])
def test_bad_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        LoRAConv2d(4, 6, 3, **{"lora_rank": 2, "lora_alpha": 5, **settings})


def test_a_rank_above_the_weights_warns():
    with pytest.warns(UserWarning, match="lora_rank 7 .*= 6"):
        LoRAConv2d(4, 6, 3, 7, 5)


# A whole net

class Mixed(nn.Cell):
    """One layer of each of four kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(3, 5, 3)
        self.flat = nn.Conv2d(1, 2, 3)
        self.head = nn.Dense(4, 3)

    def construct(self, ids):
        x = self.conv(self.embed(ids))
        return self.head(self.flat(x.expand_dims(1)))


IDS = Tensor(np.array([[1, 2, 0], [8, 2, 5]], np.int32))


def test_one_config_adapts_layers_of_many_kinds_and_files_keep_them(mode, tmp_path):
    net, fresh = Mixed(), Mixed()
    base = net(IDS).asnumpy()
    ms.load_param_into_net(fresh, net.parameters_dict())
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=5, lora_dropout=0.25,
                                        target_modules=["embed", "conv", "flat", "head"]))
    assert np.array_equal(net.set_train(False)(IDS).asnumpy(), base)
    randomise(net)
    mp.save_adapter(net, tmp_path / "adapter")
    mp.load_adapter(fresh, tmp_path / "adapter")
    assert np.array_equal(fresh.set_train(False)(IDS).asnumpy(), net(IDS).asnumpy())
    assert not np.allclose(net(IDS).asnumpy(), base)
    settings = {path: delta.settings() for path, delta in deltas(fresh).items()}
    own = {"lora_rank": 2, "lora_alpha": 5}
    assert settings == {"embed": own, **{path: {**own, "lora_dropout": 0.25} for path in ("conv", "flat", "head")}}
    full = net(IDS).asnumpy()
    mp.merge(net)
    assert {type(net.embed), type(net.conv), type(net.flat), type(net.head)} == {
        nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Dense}
    np.testing.assert_allclose(net(IDS).asnumpy(), full, **MERGED[ms.float32])


def test_all_linear_means_dense_only():
    net = mp.get_pet_model(Mixed(), mp.LoraConfig(target_modules="all-linear", lora_rank=2))
    assert [type(delta) for delta in deltas(net).values()] == [LoRADense]
