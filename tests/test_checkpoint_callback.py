"""TrainableParamsCheckPoint: what is written when `Model.train` runs, and how it is read again."""
from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.train import CheckpointConfig, Model
from nets import Attention, config, inputs, load_values, randomise

import mindpet_lite as mp
from mindpet_lite.graph import TrainableParamsCheckPoint
from mindpet_lite.train.checkpoints import save_trainable, trainable_parameters


def data(steps: int = 3):
    x = inputs(2 * steps, 6).asnumpy()
    return ds.NumpySlicesDataset({"x": x, "y": np.zeros((2 * steps, 6), np.float32)}, shuffle=False).batch(2)


def adapted(targets=("to_q", "blocks.1.0"), **fields) -> Attention:
    return mp.get_pet_model(Attention(), config(targets, **fields))


NAMES = {f"{path}.mindpet_delta_lora_{factor}" for path in ("to_q", "blocks.1.0") for factor in "ab"}


def train(net: nn.Cell, callback: TrainableParamsCheckPoint, epochs: int = 2, optimizer=nn.Adam, **model) -> Model:
    trainer = Model(net, nn.MSELoss(), optimizer(net.trainable_params(), 1e-2), **model)
    trainer.train(epochs, data(), callbacks=[callback], dataset_sink_mode=False)
    return trainer


def entries(path) -> dict:
    return ms.load_checkpoint(str(path))


def test_only_what_trains_is_written(mode):
    net = adapted()
    train(net, TrainableParamsCheckPoint("relative/folder"))
    assert sorted(os.listdir("relative/folder")) == ["DELTA_CKP-1_3.ckpt", "DELTA_CKP-2_3.ckpt"]
    found = entries("relative/folder/DELTA_CKP-2_3.ckpt")
    assert set(found) == NAMES | {"mindpet_lite"}
    for parameter in net.trainable_params():
        assert np.array_equal(found[parameter.name].asnumpy(), parameter.asnumpy())


def test_rank_alpha_and_targets_are_inside():
    net = adapted(lora_rank=3, lora_alpha=7.5, lora_dropout=0.25)
    save_trainable(net, Path("a.ckpt"), {})
    inside = json.loads(entries("a.ckpt")["mindpet_lite"])
    assert set(inside) == {"to_q", "blocks.1.0"}
    for path, layer in inside.items():
        assert layer["method"] == "lora"
        assert layer["settings"] == {"lora_rank": 3, "lora_alpha": 7.5, "lora_dropout": 0.25}
        assert set(layer["parameters"].values()) == {name for name in NAMES if name.startswith(path)}


def test_it_loads_by_name_and_by_load_adapter(mode):
    net = adapted()
    train(net, TrainableParamsCheckPoint(os.getcwd(), prefix="lora"), epochs=1)
    net.set_train(False)
    expected = net(inputs(5, 6)).asnumpy()
    by_name = adapted()
    load_values(by_name, fresh := Attention())
    load_values(fresh, net)
    load_values(by_name, fresh)
    _, unread = ms.load_param_into_net(by_name, entries("lora-1_3.ckpt"))
    assert unread in ([], ["mindpet_lite"])
    assert np.array_equal(by_name(inputs(5, 6)).asnumpy(), expected)
    mp.load_adapter(fresh, "lora-1_3.ckpt")
    assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), expected)
    assert (fresh.to_q.lora_rank, fresh.to_q.lora_alpha) == (2, 3)


def test_extra_trained_parameters_are_written_and_load_by_name():
    net = adapted(freeze_exclude=["norm.*"])
    save_trainable(net, Path("a.ckpt"), {})
    assert set(entries("a.ckpt")) == NAMES | {"norm.gamma", "norm.beta", "mindpet_lite"}
    other = Attention()
    other.norm.gamma.set_data(Tensor(np.zeros(6, np.float32)))
    mp.load_adapter(other, "a.ckpt")
    assert np.array_equal(other.norm.gamma.asnumpy(), net.norm.gamma.asnumpy())
    ms.load_param_into_net(net, entries("a.ckpt"))


def test_mindpets_way_bitfit(mode):
    net = Attention()
    mp.freeze_delta(net, "bitfit")
    train(net, TrainableParamsCheckPoint("out"), epochs=1)
    found = entries("out/DELTA_CKP-1_3.ckpt")
    assert set(found) == {"to_k.bias", "to_out.0.bias", "blocks.0.bias", "blocks.1.0.bias", "mindpet_lite"}


# Optimizer state

class OwnStep(nn.Cell):
    """A training step of the user's own, with a Parameter of its own."""

    def __init__(self, network, optimizer):
        super().__init__(auto_prefix=False)
        self.network = network
        self.optimizer = optimizer
        self.loss_scale = Parameter(Tensor(1024.0, ms.float32), name="loss_scale")
        self.manager = nn.DynamicLossScaleUpdateCell(1024, 2, 10)


@pytest.mark.parametrize("wrap", [
    lambda net, optimizer: nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer),
    lambda net, optimizer: nn.TrainOneStepWithLossScaleCell(nn.WithLossCell(net, nn.MSELoss()), optimizer,
                                                            nn.DynamicLossScaleUpdateCell(1024, 2, 10)),
    lambda net, optimizer: nn.TrainOneStepWithLossScaleCell(nn.WithLossCell(net, nn.MSELoss()), optimizer,
                                                            Tensor(1024.0)),
    OwnStep], ids=["plain", "dynamic loss scale", "fixed loss scale", "own"])
@pytest.mark.parametrize("optimizer", [nn.Adam, nn.AdamWeightDecay, nn.Momentum], ids=lambda kind: kind.__name__)
def test_a_training_step_as_the_network_saves_no_state(wrap, optimizer):
    net = adapted()
    arguments = {"momentum": 0.9} if optimizer is nn.Momentum else {}
    step = wrap(net, optimizer(net.trainable_params(), 1e-2, **arguments))
    assert len(list(step.get_parameters())) > len(list(net.get_parameters()))
    assert {item.name for item in trainable_parameters(step)} == NAMES
    assert [id(item) for item in trainable_parameters(step)] == [id(item) for item in net.trainable_params()]


def test_grouped_parameters_are_all_saved():
    net = adapted()
    a, b = ([item for item in net.trainable_params() if item.name.endswith(end)] for end in ("_a", "_b"))
    optimizer = nn.Adam([{"params": a, "lr": 0.1}, {"params": b}], 1e-2)
    assert {item.name for item in trainable_parameters(OwnStep(net, optimizer))} == NAMES


def test_model_with_a_training_step_of_its_own(mode):
    net = adapted()
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-2))
    Model(step).train(1, data(), callbacks=[TrainableParamsCheckPoint("out")], dataset_sink_mode=False)
    assert set(entries("out/DELTA_CKP-1_3.ckpt")) == NAMES | {"mindpet_lite"}


def test_saved_network_is_the_one_that_is_saved(pynative_mode):
    net, other = adapted(), adapted(["to_k"])
    train(net, TrainableParamsCheckPoint("out", config=CheckpointConfig(saved_network=other)), epochs=1)
    assert set(entries("out/DELTA_CKP-1_3.ckpt")) == {"to_k.mindpet_delta_lora_a", "to_k.mindpet_delta_lora_b",
                                                     "mindpet_lite"}


# When, how many, where

@pytest.mark.parametrize("fields, expected", [
    ({"save_checkpoint_steps": 1, "keep_checkpoint_max": 2}, ["2_2", "2_3"]),
    ({"save_checkpoint_steps": 2}, ["1_2", "2_1", "2_3"]),
    ({"save_checkpoint_steps": 4}, ["2_1", "2_3"]),
    ({"save_checkpoint_steps": 100}, ["2_3"]),
    ({"save_checkpoint_steps": None, "save_checkpoint_seconds": 3600}, ["2_3"]),
])
def test_steps_and_numbers(fields, expected, pynative_mode):
    train(adapted(), TrainableParamsCheckPoint("out", "x", CheckpointConfig(**fields)))
    assert sorted(os.listdir("out")) == [f"x-{item}.ckpt" for item in expected]


def test_without_a_config_the_last_five_epochs_stay(pynative_mode):
    train(adapted(), TrainableParamsCheckPoint("out"), epochs=7)
    assert sorted(os.listdir("out")) == [f"DELTA_CKP-{epoch}_3.ckpt" for epoch in (3, 4, 5, 6, 7)]


def test_a_callback_can_be_used_again(pynative_mode):
    callback = TrainableParamsCheckPoint("out", config=CheckpointConfig(save_checkpoint_steps=3))
    train(adapted(), callback, epochs=2)
    net = adapted()
    train(net, callback, epochs=1)
    found = entries("out/DELTA_CKP-1_3.ckpt")
    assert all(np.array_equal(found[item.name].asnumpy(), item.asnumpy()) for item in net.trainable_params())


def test_files_of_others_stay(pynative_mode):
    Path("out").mkdir()
    Path("out", "DELTA_CKP-9_9.ckpt").write_text("mine")
    train(adapted(), TrainableParamsCheckPoint("out", config=CheckpointConfig(keep_checkpoint_max=1)), epochs=1)
    assert sorted(os.listdir("out")) == ["DELTA_CKP-1_3.ckpt", "DELTA_CKP-9_9.ckpt"]
    assert Path("out", "DELTA_CKP-9_9.ckpt").read_text() == "mine"


def test_sink_mode_writes_at_the_end_of_epochs(graph_mode):
    # The CPU backend has no sink mode; this is what Model.train tells callbacks in it.
    net, callback = adapted(), TrainableParamsCheckPoint("out")
    params = SimpleNamespace(network=net, train_network=None, batch_num=3, cur_step_num=0, cur_epoch_num=1)
    context = SimpleNamespace(original_args=lambda: params)
    callback.on_train_begin(context)
    for epoch in (1, 2):
        params.cur_step_num, params.cur_epoch_num = 3 * epoch, epoch
        callback.on_train_step_end(context)
    callback.on_train_end(context)
    assert sorted(os.listdir("out")) == ["DELTA_CKP-1_3.ckpt", "DELTA_CKP-2_3.ckpt"]


# Refusals

@pytest.mark.parametrize("arguments, error, message", [
    (("",), ValueError, "directory"), ((None,), (TypeError, ValueError), "directory"), ((3,), TypeError, "directory"),
    (("out", ""), ValueError, "prefix"), (("out", None), TypeError, "prefix"), (("out", "a/b"), ValueError, "prefix"),
    (("out", "x", {"keep": 3}), TypeError, "config"),
    (("out", "x", CheckpointConfig(enc_key=b"0" * 16)), ValueError, "enc_key"),
])
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TrainableParamsCheckPoint(*arguments)
    assert not Path("out").exists()


def test_nothing_to_save_is_said_before_the_first_step():
    net = Attention()
    optimizer = nn.Adam(net.trainable_params(), 1e-2)
    before = net.to_q.weight.asnumpy().copy()
    mp.freeze_modules(net, include=["*"])
    with pytest.raises(ValueError, match="no trainable parameter to save"):
        Model(net, nn.MSELoss(), optimizer).train(1, data(), callbacks=[TrainableParamsCheckPoint("out")],
                                                  dataset_sink_mode=False)
    assert np.array_equal(net.to_q.weight.asnumpy(), before) and not Path("out").exists()


def test_a_failing_disk_leaves_the_old_checkpoint(monkeypatch):
    net = adapted()
    save_trainable(net, Path("out/a.ckpt"), {})
    old = Path("out/a.ckpt").read_bytes()
    randomise(net)

    def full(*args, **kwargs):
        Path(args[1] + ".tmp").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ms, "save_checkpoint", full)
    with pytest.raises(OSError, match="out/a.ckpt could not be written .No space left on device"):
        save_trainable(net, Path("out/a.ckpt"), {})
    assert os.listdir("out") == ["a.ckpt"] and Path("out/a.ckpt").read_bytes() == old


def test_an_unwritable_folder_stops_before_the_first_step():
    Path("file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        train(adapted(), TrainableParamsCheckPoint("file"))
    assert Path("file").read_text() == "mine"


def test_entries_of_the_users_own_are_written_and_loaded_past():
    net = adapted()
    config_ = CheckpointConfig(append_info=["epoch_num", "step_num", {"note": 7}])
    train(net, TrainableParamsCheckPoint("out", config=config_), epochs=2)
    stored = ms.load_checkpoint(f"out/{max(os.listdir('out'))}")
    assert [int(stored[name].asnumpy()) for name in ("epoch_num", "note")] == [2, 7] and "step_num" in stored
    fresh = adapted()
    load_values(fresh, net)
    randomise(fresh, seed=9)
    mp.load_adapter(fresh, f"out/{max(os.listdir('out'))}")
    x = inputs(2, 6)
    assert np.array_equal(fresh.set_train(False)(x).asnumpy(), net.set_train(False)(x).asnumpy())


def test_one_file_in_some_minutes_is_kept(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    callback = TrainableParamsCheckPoint("out", config=CheckpointConfig(
        save_checkpoint_steps=1, keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=2))
    params = SimpleNamespace(network=adapted(), train_network=None, batch_num=100, cur_step_num=0, cur_epoch_num=1)
    context = SimpleNamespace(original_args=lambda: params)
    callback.on_train_begin(context)
    for step in range(1, 8):
        now[0], params.cur_step_num = 50.0 * step, step
        callback.on_train_step_end(context)
    # Each save drops what is less than two minutes older than it; 50 seconds apart, nothing grows old enough.
    assert sorted(os.listdir("out")) == ["DELTA_CKP-1_7.ckpt"]
    now[0], params.cur_step_num = 1000.0, 8
    callback.on_train_step_end(context)
    assert sorted(os.listdir("out")) == ["DELTA_CKP-1_7.ckpt", "DELTA_CKP-1_8.ckpt"]


def test_a_head_that_trained_beside_the_deltas_is_loaded_too():
    net = adapted()
    mp.freeze_delta(net, "lora", exclude=["to_k.*"])
    train(net, TrainableParamsCheckPoint("out"), epochs=1)
    fresh = Attention()
    load_values(fresh, net)
    fresh.to_k.weight.set_data(Tensor(np.zeros((6, 6), np.float32)))
    mp.load_adapter(fresh, "out/DELTA_CKP-1_3.ckpt")
    x = inputs(2, 6)
    assert np.array_equal(fresh.set_train(False)(x).asnumpy(), net.set_train(False)(x).asnumpy())
