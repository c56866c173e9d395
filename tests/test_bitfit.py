"""BitFit: the net's own biases train, and go through files, merge and checkpoints like any delta."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Model
from nets import Attention, config, inputs, load_values, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite import BitFitConfig
from mindpet_lite.delta import METHODS

BIASES = {"to_k.bias", "to_out.0.bias", "blocks.0.bias", "blocks.1.0.bias"}


def training(net: nn.Cell) -> set[str]:
    return {path for path, item in net.parameters_and_names() if item.requires_grad}


def trained(net: nn.Cell) -> nn.Cell:
    """Return `net` with other values in its trained biases."""
    rng = np.random.default_rng(5)
    for item in net.trainable_params():
        item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net.set_train(False)


@pytest.mark.parametrize("make", [lambda net: mp.freeze_delta(net, "bitfit"),
                                  lambda net: mp.get_pet_model(net, BitFitConfig()),
                                  lambda net: mp.get_pet_model(net, {"pet_type": "bitfit"})])
def test_every_bias_of_the_net_trains_and_nothing_is_added(make):
    net = Attention()
    names = [item.name for item in net.get_parameters()]
    cells = {path: id(cell) for path, cell in net.cells_and_names()}
    make(net)
    assert training(net) == BIASES
    assert [item.name for item in net.get_parameters()] == names
    assert {path: id(cell) for path, cell in net.cells_and_names()} == cells


def test_from_yaml():
    Path("bitfit.yaml").write_text("pet_config:\n  pet_type: bitfit\n  target_modules: [to_k, blocks.0]\n")
    net = mp.get_pet_model(Attention(), "bitfit.yaml")
    assert training(net) == {"to_k.bias", "blocks.0.bias"}


def test_targets_excludes_and_lists():
    assert training(mp.get_pet_model(Attention(), BitFitConfig(exclude_modules=["to_out.0"]))) == BIASES - {
        "to_out.0.bias"}
    assert training(mp.get_pet_model(Attention(), BitFitConfig(freeze_exclude=["*beta"]))) == BIASES | {"norm.beta"}
    assert training(mp.get_pet_model(Attention(), BitFitConfig(freeze_include=["blocks*"]))) == {
        "to_k.bias", "to_out.0.bias"}


def test_a_bias_by_any_name_that_ends_so():
    class Odd(nn.Cell):
        def __init__(self):
            super().__init__()
            self.qkv_bias = Parameter(Tensor(np.zeros(3, np.float32)))
            self.biased = Parameter(Tensor(np.zeros(3, np.float32)))

    net = mp.get_pet_model(nn.SequentialCell(Odd()), BitFitConfig())
    assert training(net) == {"0.qkv_bias"}


@pytest.mark.parametrize("settings, message", [
    ({"target_modules": ["to_q"]}, "to_q: Dense has no bias"),
    ({"target_modules": ["to_kk"]}, "Did you mean 'to_k'"),
    ({"freeze_include": ["*bias"]}, "leaves nothing trainable"),
])
def test_what_does_not_fit_is_refused(settings, message):
    net = Attention()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.get_pet_model(net, BitFitConfig(**settings))


def test_a_net_without_biases_is_refused():
    net = nn.SequentialCell(nn.Dense(3, 3, has_bias=False))
    with unchanged(net), pytest.raises(ValueError, match="leaves no layer to adapt: the net has none"):
        mp.get_pet_model(net, BitFitConfig())


def test_files_hold_the_biases_alone_and_make_a_fresh_net_the_same(mode):
    fresh = Attention()
    net = Attention()
    load_values(net, fresh)
    trained(mp.get_pet_model(net, BitFitConfig()))
    mp.save_adapter(net, "adapter")
    described = json.loads(Path("adapter/adapter_config.json").read_text())
    assert described["pet_type"] == "bitfit" and "peft_type" not in described
    mp.load_adapter(fresh.set_train(False), "adapter")
    assert training(fresh) == BIASES
    assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy())


def test_merging_makes_it_plain_and_unmerging_gives_it_back():
    net = trained(mp.get_pet_model(Attention(), BitFitConfig()))
    values = {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}
    mp.merge(net)
    assert not net.trainable_params()
    for call in (mp.merge, lambda net: mp.save_adapter(net, "adapter")):
        with pytest.raises(ValueError, match="no adapted layer"):
            call(net)
    mp.unmerge(net)
    assert training(net) == BIASES
    assert {item.name: item.asnumpy().tobytes() for item in net.get_parameters()} == values


def test_switched_off_it_is_the_base_and_the_file_is_the_adapters_all_the_same(mode):
    net = Attention().set_train(False)
    base = net(inputs(5, 6)).asnumpy()
    trained(mp.get_pet_model(net, BitFitConfig()))
    full = net(inputs(5, 6)).asnumpy()
    mp.save_adapter(net, "out")
    with mp.adapters_disabled(net):
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), base)
        mp.save_adapter(net, "inside")
        with pytest.raises(ValueError, match="leave the block"):
            mp.merge(net)
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), full)
    assert Path("inside/adapter_model.safetensors").read_bytes() == Path("out/adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="to_k: what trains are the layer's own Parameters"):
        mp.set_lora_scale(net, 0.5)


def test_what_trains_with_the_biases_is_saved_with_them():
    net = Attention()
    with pytest.raises(ValueError, match="no adapted layer"):
        mp.save_adapter(net, "adapter")
    mp.freeze_modules(net, include=["*"], exclude=["*bias"])
    with pytest.raises(ValueError, match="no adapted layer.*What trains here is .*TrainableParamsCheckPoint saves"):
        mp.save_adapter(net, "adapter")
    mp.freeze_delta(net, "bitfit", exclude=["to_q.weight"])
    trained(net)
    mp.save_adapter(net, "adapter")
    fresh = Attention()
    load_values(fresh, net)
    for item in fresh.get_parameters():
        if item.name in BIASES | {"to_q.weight"}:
            item.set_data(Tensor(np.zeros(item.shape, np.float32)))
    mp.load_adapter(fresh.set_train(False), "adapter")
    assert training(fresh) == BIASES | {"to_q.weight"}
    assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy())


def with_lora() -> nn.Cell:
    """Return a net with LoRA, and a bias of B, on two of its layers with biases."""
    net = mp.get_pet_model(Attention(), config(["to_k", "blocks.0"], lora_bias=True))
    randomise(net)
    return net.set_train(False)


@pytest.mark.parametrize("begin", [lambda net: mp.freeze_delta(net, "bitfit"),
                                   lambda net: mp.get_pet_model(net, BitFitConfig())], ids=["freeze_delta", "config"])
def test_biases_of_a_net_with_lora_belong_to_its_adapter(begin, pynative_mode):
    net = with_lora()
    base = {item.name: item.asnumpy().copy() for item in net.get_parameters()}
    with mp.adapters_disabled(net):
        plain = net(inputs(5, 6)).asnumpy()
    begin(net)
    lora = {path for path in training(net) if "lora" in path}
    assert training(net) - lora == BIASES
    for item in net.get_parameters():
        if item.name in BIASES:
            item.set_data(Tensor(base[item.name] + 1))
    adapted = net(inputs(5, 6)).asnumpy()
    report = mp.summary(net)
    assert len(report.rows) == 2 and set(report.saved) == BIASES
    assert "and 4 parameters of the base: " in str(report)
    mp.save_adapter(net, "adapter")
    config_file = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config_file["peft_type"] == "LORA" and config_file["bias"] == "all"
    with mp.adapters_disabled(net):
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), plain)
    fresh = Attention().set_train(False)
    for item in fresh.get_parameters():
        item.set_data(Tensor(base[item.name].copy()))
    mp.load_adapter(fresh, "adapter")
    assert BIASES <= training(fresh)
    assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), adapted)
    with mp.adapters_disabled(fresh):
        assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), plain)
    assert np.abs(mp.merge(fresh)(inputs(5, 6)).asnumpy() - adapted).max() <= 1e-5
    mp.unmerge(fresh)
    assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), adapted)


def test_lora_on_a_net_with_trained_biases_takes_them_along(pynative_mode):
    net = mp.get_pet_model(Attention(), BitFitConfig()).set_train(False)
    plain = net(inputs(5, 6)).asnumpy()
    trained(net)
    mp.get_pet_model(net, config(["to_q"]))
    randomise(net)
    adapted = net(inputs(5, 6)).asnumpy()
    mp.save_adapter(net, "adapter")
    assert BIASES < training(net)
    with mp.adapters_disabled(net):
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), plain)
    fresh = Attention().set_train(False)
    load_values(fresh, net)
    mp.load_adapter(fresh, "adapter")
    assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), adapted)


def test_a_loaded_adapter_that_is_saved_again_names_the_base_it_was_trained_on(pynative_mode):
    mp.save_adapter(mp.get_pet_model(Attention(), BitFitConfig()), "adapter")
    other = Attention()
    with pytest.warns(UserWarning, match="trained on another base"):
        mp.load_adapter(other, "adapter")
    mp.save_adapter(other, "again")
    assert Path("again/adapter_config.json").read_bytes() == Path("adapter/adapter_config.json").read_bytes()


def test_a_file_that_does_not_fit_changes_nothing():
    mp.save_adapter(mp.get_pet_model(Attention(), BitFitConfig()), "adapter")
    net = Attention(width=8)
    with unchanged(net), pytest.raises(ValueError, match="misshapen: to_k.bias"):
        mp.load_adapter(net, "adapter")
    net = nn.SequentialCell(nn.Dense(6, 6))
    with unchanged(net), pytest.raises(ValueError, match="unexpected: to_k is no layer of the net"):
        mp.load_adapter(net, "adapter")


def test_checkpoints_while_training(graph_mode):
    net = mp.get_pet_model(Attention(), BitFitConfig())
    data = NumpySlicesDataset((inputs(8, 6).asnumpy(), np.ones((8, 6), np.float32)), shuffle=False).batch(4)
    model = Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 0.1))
    model.train(1, data, [mp.TrainableParamsCheckPoint("checkpoints")], dataset_sink_mode=False)
    stored = ms.load_checkpoint("checkpoints/DELTA_CKP-1_2.ckpt")
    assert {name for name in stored if name != "mindpet_lite"} == BIASES
    fresh = Attention()
    load_values(fresh, net)
    for item in fresh.get_parameters():
        if item.name in BIASES:
            item.set_data(Tensor(np.zeros(item.shape, np.float32)))
    mp.load_adapter(fresh, "checkpoints/DELTA_CKP-1_2.ckpt")
    assert np.array_equal(fresh.set_train(False)(inputs(5, 6)).asnumpy(),
                          net.set_train(False)(inputs(5, 6)).asnumpy())


def test_summary_lists_them(capsys):
    net = mp.get_pet_model(Attention(), BitFitConfig(target_modules=["to_k"]))
    assert mp.summary(net).rows == (("to_k", "TrainedBias", "bitfit", "", "(6,)", "6"),)


def test_it_is_in_the_table_of_methods():
    assert METHODS["bitfit"] is BitFitConfig
