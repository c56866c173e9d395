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
from nets import Attention, config, inputs, load_values, unchanged

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


def test_a_net_that_trains_otherwise_is_no_bitfit_net():
    net = Attention()
    with pytest.raises(ValueError, match="no adapted layer"):
        mp.save_adapter(net, "adapter")
    mp.freeze_delta(net, "bitfit", exclude=["to_q.weight"])
    with pytest.raises(ValueError, match="no adapted layer.*What trains here is .*TrainableParamsCheckPoint saves"):
        mp.save_adapter(net, "adapter")


def test_biases_beside_lora_are_not_left_out_silently():
    net = mp.get_pet_model(Attention(), config(["to_q"]))
    mp.freeze_delta(net, "bitfit")
    with pytest.raises(ValueError, match="bitfit and lora"):
        mp.save_adapter(net, "adapter")


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
