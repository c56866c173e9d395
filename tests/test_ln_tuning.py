"""LN tuning: norms of any class train where they are, and go through files, switches and checkpoints as any delta."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops
from nets import config, inputs, unchanged
from peft_models import RMSNorm
from safetensors.numpy import load_file

import mindpet_lite as mp
from mindpet_lite import LNTuningConfig
from mindpet_lite.train.checkpoints import save_trainable

TRAINED = {"first.gamma", "first.beta", "last.weight"}


class Net(nn.Cell):
    """A LayerNorm and an RMSNorm with a Dense after each."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first, self.q, self.last, self.head = nn.LayerNorm((6,)), nn.Dense(6, 6), RMSNorm(6), nn.Dense(6, 3)
        rng = np.random.default_rng(seed)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))

    def construct(self, x):
        return self.head(self.last(ops.tanh(self.q(self.first(x)))))


def training(net: nn.Cell) -> set[str]:
    return {path for path, item in net.parameters_and_names() if item.requires_grad}


def shaken(net: nn.Cell, seed: int = 5) -> nn.Cell:
    """Give what trains other values, as an optimizer does: in place."""
    rng = np.random.default_rng(seed)
    for item in net.trainable_params():
        ops.assign(item, Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net


def output(net: nn.Cell) -> np.ndarray:
    return net(inputs(5, 6)).asnumpy()


def switched_off(net: nn.Cell) -> np.ndarray:
    with mp.adapters_disabled(net):
        return output(net)


def held(net: nn.Cell) -> dict[str, bytes]:
    return {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}


# Which cells are norms

class Scale(nn.Cell):
    """A cell that nobody would call a norm, with a number for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(4, np.float32)))


class NormedDense(nn.Dense):
    """A layer that is called so and is none."""


class ChannelNorm(nn.Cell):
    """A norm whose scale has the axes of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = Parameter(Tensor(np.ones((1, 4, 1, 1), np.float32)))
        self.beta = Parameter(Tensor(np.zeros((1, 4, 1, 1), np.float32)))


class Zoo(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.axes, self.group = nn.LayerNorm((4,)), nn.LayerNorm((3, 4)), nn.GroupNorm(2, 4)
        self.mint_layer, self.mint_group = mint.nn.LayerNorm(4, bias=False), mint.nn.GroupNorm(2, 4)
        self.rms, self.channel = RMSNorm(4), ChannelNorm()
        self.scale, self.dense, self.normed, self.batch = Scale(), nn.Dense(4, 4), NormedDense(4, 4), nn.BatchNorm2d(4)
        self.constant, self.without = nn.GroupNorm(2, 4, affine=False), mint.nn.LayerNorm(4, elementwise_affine=False)


NORMS = {"layer.gamma", "layer.beta", "axes.gamma", "axes.beta", "group.gamma", "group.beta", "mint_layer.weight",
         "mint_group.weight", "mint_group.bias", "rms.weight", "channel.gamma", "channel.beta"}


@pytest.mark.filterwarnings("ignore:The statistics of batch")
@pytest.mark.parametrize("begin", [lambda net: mp.get_pet_model(net, LNTuningConfig()),
                                   lambda net: mp.get_pet_model(net, {"pet_type": "ln_tuning"}),
                                   lambda net: mp.freeze_delta(net, "ln_tuning")])
def test_without_targets_every_norm_by_its_class_trains(begin):
    net = Zoo()
    cells = {path: id(cell) for path, cell in net.cells_and_names()}
    names = [item.name for item in net.get_parameters()]
    begin(net)
    assert training(net) == NORMS
    assert {path: id(cell) for path, cell in net.cells_and_names()} == cells
    assert [item.name for item in net.get_parameters()] == names


@pytest.mark.filterwarnings("ignore:The statistics of batch")
def test_targets_are_names_of_any_cell_that_is_made_as_a_norm():
    assert training(mp.get_pet_model(Zoo(), LNTuningConfig(target_modules=["scale", "rms"]))) == {"scale.weight",
                                                                                                "rms.weight"}
    net = mp.get_pet_model(Zoo(), LNTuningConfig(exclude_modules=["axes", "mint_group"]))
    assert training(net) == {name for name in NORMS if not name.startswith(("axes", "mint_group"))}


@pytest.mark.parametrize("target, message", [
    ("dense", "Dense is no norm: expected a number for each channel, but .* the shapes .4, 4., .4,."),
    ("normed", "NormedDense is no norm"), ("constant", "made with affine=False"),
    ("batch", "expected a weight .* but its Parameters are moving_mean, .* Name it in modules_to_save"),
    ("nrom", "hits nothing")])
def test_what_is_no_norm_is_refused(target, message):
    net = Zoo()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.get_pet_model(net, LNTuningConfig(target_modules=["layer", target]))


def test_a_net_without_norms_and_one_that_is_tuned_with_another_type():
    net = nn.SequentialCell(nn.Dense(3, 3))
    with unchanged(net), pytest.raises(ValueError, match="leaves no layer to adapt: the net has none"):
        mp.get_pet_model(net, LNTuningConfig())
    with pytest.raises(ValueError, match="mode 'ln_tuning' leaves nothing trainable"):
        mp.freeze_delta(net, "ln_tuning")
    norm = RMSNorm(3)
    norm.weight.set_dtype(ms.int32)
    with pytest.raises(ValueError, match="type Int32.*LN tuning adapts layers of a float type"):
        mp.get_pet_model(nn.SequentialCell(norm), LNTuningConfig(target_modules=["0"]))


# Files

def test_pefts_file_has_pytorchs_names_whatever_the_norms_are_called_here(pynative_mode):
    net = shaken(mp.get_pet_model(Net(), LNTuningConfig()))
    mp.save_adapter(net, "out")
    stored = load_file("out/adapter_model.safetensors")
    assert {key: value.tobytes() for key, value in stored.items()} == {
        f"base_model.model.{path}": value.asnumpy().tobytes() for path, value in (
            ("first.ln_tuning_layers.weight", net.first.gamma), ("first.ln_tuning_layers.bias", net.first.beta),
            ("last.ln_tuning_layers.weight", net.last.weight))}
    described = json.loads(Path("out/adapter_config.json").read_text())
    assert described["peft_type"] == "LN_TUNING" and described["target_modules"] == ["first", "last"]
    other = Net()
    other.first = mint.nn.LayerNorm(6)
    mp.load_adapter(other, "out")
    assert np.array_equal(other.first.weight.asnumpy(), net.first.gamma.asnumpy())
    assert training(other) == {"first.weight", "first.bias", "last.weight"}
    fresh = mp.load_adapter(Net(), "out")
    assert np.array_equal(output(fresh), output(net)) and np.array_equal(switched_off(fresh), output(Net()))


def test_what_trains_beside_is_in_the_same_file(pynative_mode):
    net = shaken(mp.get_pet_model(Net(), LNTuningConfig(modules_to_save=["head"])))
    mp.save_adapter(net, "out")
    assert set(load_file("out/adapter_model.safetensors")) >= {"base_model.model.head.weight"}
    assert np.array_equal(output(mp.load_adapter(Net(), "out")), output(net))


def test_a_file_that_does_not_fit_changes_nothing():
    mp.save_adapter(mp.get_pet_model(Net(), LNTuningConfig()), "out")
    for change, message in ((lambda net: setattr(net, "last", RMSNorm(7)), "misshapen: last.weight"),
                            (lambda net: setattr(net, "first", RMSNorm(6)), "unexpected: first.bias"),
                            (lambda net: setattr(net, "last", nn.LayerNorm((6,))), "missing: last.bias"),
                            (lambda net: setattr(net, "last", nn.Dense(6, 6)), "last: Dense is no norm")):
        net = Net()
        change(net)
        with unchanged(net), pytest.raises(ValueError, match=message):
            mp.load_adapter(net, "out")


def test_checkpoints_have_the_nets_own_names(pynative_mode):
    net = shaken(mp.get_pet_model(Net(), LNTuningConfig()))
    save_trainable(net, Path("some.ckpt"), {})
    stored = ms.load_checkpoint("some.ckpt")
    assert {name for name in stored if name != "mindpet_lite"} == TRAINED
    assert np.array_equal(output(mp.load_adapter(Net(), "some.ckpt")), output(net))
    plain = Net()
    ms.load_param_into_net(plain, stored)
    assert np.array_equal(output(plain), output(net))


# Switching and undoing

def test_switched_off_it_is_the_base_and_the_file_is_the_adapters_all_the_same(mode):
    base, net = output(Net()), shaken(mp.get_pet_model(Net(), LNTuningConfig()))
    trained, values = output(net), held(net)
    mp.save_adapter(net, "out")
    with mp.adapters_disabled(net):
        assert np.array_equal(output(net), base)
        with mp.adapters_disabled(net):
            assert np.array_equal(output(net), base)
        assert np.array_equal(output(net), base)
        mp.save_adapter(net, "inside")
        for call in (lambda: mp.merge(net), lambda: mp.set_lora_scale(net, 1)):
            with pytest.raises(ValueError, match="adapters_disabled|switched off|layer's own Parameters"):
                call()
    assert np.array_equal(output(net), trained) and held(net) == values
    assert Path("inside/adapter_model.safetensors").read_bytes() == Path("out/adapter_model.safetensors").read_bytes()
    shaken(net, 9)
    with mp.adapters_disabled(net):
        mp.load_adapter(net, "out")
        assert np.array_equal(output(net), base)
    assert np.array_equal(output(net), trained) and held(net) == values
    with pytest.raises(ValueError, match="first: what trains are the layer's own Parameters"):
        mp.set_lora_scale(net, 0.5)


def test_merged_it_is_plain_and_unmerged_the_base_is_known_again(pynative_mode):
    net = shaken(mp.get_pet_model(Net(), LNTuningConfig()))
    trained, values = output(net), held(net)
    mp.merge(net)
    assert not net.trainable_params() and held(net) == values and np.array_equal(output(net), trained)
    with pytest.raises(ValueError, match="no adapted layer"):
        switched_off(net)
    mp.unmerge(net)
    assert training(net) == TRAINED and held(net) == values
    assert np.array_equal(switched_off(net), output(Net())) and np.array_equal(output(net), trained)
    copied = copy.deepcopy(net)
    shaken(net)
    assert np.array_equal(switched_off(copied), output(Net())) and np.array_equal(output(copied), trained)


def test_check_and_summary(pynative_mode, capsys):
    net = mp.get_pet_model(Net(), LNTuningConfig())
    values = held(net)
    assert mp.check_adapters(net, inputs(5, 6)) == ["first", "last"] and held(net) == values
    assert mp.summary(net).rows[0] == ("first", "TrainedNorm", "ln_tuning", "", "(6,) (6,)", "12")


# The base, before and after

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_base_that_is_loaded_after_injection_is_where_training_starts(by_hand, mode):
    base, net = Net(1), mp.get_pet_model(Net(2), LNTuningConfig())
    ms.save_checkpoint(base, "base.ckpt")
    if by_hand:
        values = {item.name: item.asnumpy() for item in base.get_parameters()}
        for item in net.get_parameters():
            item.set_data(Tensor(values[item.name]))
    else:
        ms.load_checkpoint("base.ckpt", net)
    assert np.array_equal(output(net), output(base)) and np.array_equal(switched_off(net), output(base))
    shaken(net)
    assert np.array_equal(switched_off(net), output(base)) and not np.array_equal(output(net), output(base))


@pytest.mark.filterwarnings("error")
def test_a_base_and_then_what_trained_give_the_net_back(pynative_mode):
    base, source = Net(1), shaken(mp.get_pet_model(Net(1), LNTuningConfig()))
    ms.save_checkpoint(base, "base.ckpt")
    ms.save_checkpoint([{"name": item.name, "data": item} for item in source.trainable_params()], "trained.ckpt")
    net = mp.get_pet_model(Net(2), LNTuningConfig())
    for file in ("base.ckpt", "trained.ckpt"):
        ms.load_param_into_net(net, ms.load_checkpoint(file))
    assert np.array_equal(output(net), output(source)) and np.array_equal(switched_off(net), output(base))


# With another adapter

def with_lora(net: nn.Cell) -> nn.Cell:
    return mp.get_pet_model(net, config(["q"]))


@pytest.mark.parametrize("lora_first", [True, False])
def test_norms_of_a_net_with_lora_belong_to_its_adapter(lora_first, pynative_mode):
    net = Net()
    for begin in (with_lora, lambda net: mp.get_pet_model(net, LNTuningConfig()))[::1 if lora_first else -1]:
        begin(net)
    assert {name for name in training(net) if "lora" not in name} == TRAINED
    shaken(net)
    mp.save_adapter(net, "out")
    described = json.loads(Path("out/adapter_config.json").read_text())
    assert described["peft_type"] == "LORA" and described["modules_to_save"] == ["first", "last"]
    fresh = mp.load_adapter(Net(), "out")
    assert np.array_equal(output(fresh), output(net))
    assert np.array_equal(switched_off(net), output(Net())) and np.array_equal(switched_off(fresh), output(Net()))


def test_a_file_of_norms_joins_an_adapter_which_stays_what_it_is(pynative_mode):
    tuned = shaken(mp.get_pet_model(Net(), LNTuningConfig()))
    mp.save_adapter(tuned, "norms")
    mp.save_adapter(shaken(with_lora(Net())), "lora")
    net = mp.load_adapter(mp.load_adapter(Net(), "lora"), "norms")
    assert np.array_equal(net.first.gamma.asnumpy(), tuned.first.gamma.asnumpy())
    mp.save_adapter(net, "both")
    assert json.loads(Path("both/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert np.array_equal(output(mp.load_adapter(Net(), "both")), output(net))


def test_norms_beside_another_method(pynative_mode):
    net = mp.get_pet_model(mp.get_pet_model(Net(), LNTuningConfig()), mp.IA3Config(target_modules=["q"]))
    shaken(net)
    mp.save_adapter(net, "out")
    assert np.array_equal(output(mp.load_adapter(Net(), "out")), output(net))
    assert np.array_equal(switched_off(net), output(Net()))
    mp.get_pet_model(net, mp.BitFitConfig(target_modules=["head"]))
    assert TRAINED | {"head.bias"} < training(net)
