"""MindPet 1.0.4's defects, by their numbers in docs/mindpet.md: each test fails on what MindPet does.

Those of the adapter imports (1), the prefix layer (14), R-Drop (15) and the tasks (7, 16 to 20) stand with those parts.
"""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Model

from mindpet_lite.delta import LoRADense
from mindpet_lite.graph import TrainableParamsCheckPoint, freeze_delta, freeze_from_config, freeze_modules

DELTAS = {"0.mindpet_delta_lora_a", "0.mindpet_delta_lora_b"}


def lora_net() -> nn.Cell:
    return nn.SequentialCell(LoRADense(6, 5, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0), nn.Dense(5, 4))


def training(net: nn.Cell) -> set[str]:
    return {path for path, item in net.parameters_and_names() if item.requires_grad}


def test_defect_02_the_mode_in_another_case_freezes_the_same():
    net = lora_net()
    freeze_delta(net, "LoRA")
    assert training(net) == DELTAS


def test_defect_03_a_mode_that_leaves_nothing_trainable_is_refused():
    net = lora_net()
    with pytest.raises(ValueError, match="leaves nothing trainable"):
        freeze_delta(net, "adapter")
    assert len(training(net)) == 6


def test_defect_04_the_result_does_not_depend_on_what_was_frozen_before():
    net = lora_net()
    freeze_modules(net, include=["*"])
    freeze_delta(net, "lora")
    assert training(net) == DELTAS
    freeze_delta(net, "bitfit")
    assert training(net) == {"0.bias", "1.bias"}


def test_defect_05_both_spellings_of_a_name_hit_and_brackets_stand_for_themselves():
    layer = LoRADense(6, 5, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0)
    layer.mindpet_delta_lora_a.name = "mindpet_delta_lora_A"
    freeze_modules(layer, include=["*lora_A"])
    assert not layer.mindpet_delta_lora_a.requires_grad and layer.mindpet_delta_lora_b.requires_grad
    with pytest.raises(ValueError, match="matches no parameter"):
        freeze_modules(layer, include=["[mw]eight"])


@pytest.mark.parametrize("lists, expected", [
    ("include: ['0.*']", {"1.weight", "1.bias"}),
    ("exclude: ['0.bias']", {"0.weight", "0.bias", *DELTAS, "1.weight", "1.bias"})])
def test_defect_06_one_list_is_enough_in_a_config(lists, expected):
    Path("freeze.yaml").write_text(f"freeze:\n  {lists}\n")
    net = lora_net()
    freeze_from_config(net, "freeze.yaml")
    assert training(net) == expected


def test_defect_06_tuples_are_lists_too():
    net = lora_net()
    freeze_modules(net, include=("0.*",))
    assert training(net) == {"1.weight", "1.bias"}


def test_defect_07_a_missing_freeze_config_is_not_made():
    with pytest.raises(FileNotFoundError):
        freeze_from_config(lora_net(), "missing.yaml")
    assert not Path("missing.yaml").exists()


def test_defect_08_a_named_activation_can_be_split():
    layer = LoRADense(6, 5, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, activation="relu")
    layer.shard(strategy_activation=((2, 1),))
    assert layer.activation.relu.in_strategy == ((2, 1),)


def test_defect_09_an_fp32_layer_computes_in_fp32(mode):
    layer = LoRADense(256, 4, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, has_bias=False)
    x = Tensor(np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32))
    exact = x.asnumpy().astype(np.float64) @ layer.weight.asnumpy().astype(np.float64).T
    # Through float16 the error is a thousand times larger.
    np.testing.assert_allclose(layer(x).asnumpy(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"lora_alpha": -1.0}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")},
                                      {"lora_dropout": float("nan")}])
def test_defect_10_numbers_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LoRADense(6, 5, **{"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.0, **settings})


def test_defect_10_no_dropout_may_be_an_int():
    assert LoRADense(6, 5, lora_rank=2, lora_alpha=4.0, lora_dropout=0).dropout_rate == 0


def test_defect_10_a_rank_that_is_wasted_is_said():
    with pytest.warns(UserWarning, match="lora_rank 7 is above"):
        LoRADense(6, 5, lora_rank=7, lora_alpha=4.0, lora_dropout=0.0)


@pytest.mark.parametrize("name", ["param_init_type", "compute_dtype"])
def test_defect_11_the_message_lists_every_type_that_is_accepted(name):
    with pytest.raises(TypeError, match=f"{name}.*float16.*bfloat16.*float32"):
        LoRADense(6, 5, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, **{name: ms.int32})


def test_defect_12_to_float_goes_with_another_compute_type(mode):
    layer = LoRADense(6, 5, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, compute_dtype=ms.float32)
    layer.to_float(ms.float16)
    x = Tensor(np.ones((3, 6), np.float32))
    expected = x.asnumpy() @ layer.weight.asnumpy().T + layer.bias.asnumpy()
    y = layer(x)
    # What is computed in float32 is rounded once, to the type that to_float() sets.
    assert y.dtype == ms.float16
    np.testing.assert_allclose(y.asnumpy(), expected.astype(np.float16), rtol=1e-3, atol=1e-6)


def test_defect_12_one_axis_is_enough(mode):
    layer = LoRADense(6, 5, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, compute_dtype=ms.float32)
    x = np.arange(6, dtype=np.float32)
    expected = x @ layer.weight.asnumpy().T + layer.bias.asnumpy()
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), expected, rtol=1e-5, atol=1e-6)


def test_defect_13_a_checkpoint_holds_what_trains_and_nothing_else(tmp_path, graph_mode):
    net = lora_net()
    freeze_delta(net, "lora")
    data = NumpySlicesDataset((np.ones((4, 6), np.float32), np.ones((4, 4), np.float32)), shuffle=False).batch(4)
    model = Model(net, nn.MSELoss(), nn.Adam(net.trainable_params()))
    callback = TrainableParamsCheckPoint(directory=str(tmp_path / "out"))
    model.train(1, data, callbacks=[callback], dataset_sink_mode=False)
    stored = ms.load_checkpoint(str(tmp_path / "out" / "DELTA_CKP-1_1.ckpt"))
    assert {name for name, value in stored.items() if isinstance(value, ms.Parameter)} == DELTAS


def test_defect_13_rank_and_alpha_are_in_it(tmp_path, graph_mode):
    from mindpet_lite import load_adapter
    net = lora_net()
    freeze_delta(net, "lora")
    data = NumpySlicesDataset((np.ones((4, 6), np.float32), np.ones((4, 4), np.float32)), shuffle=False).batch(4)
    model = Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 0.1))
    model.train(2, data, callbacks=[TrainableParamsCheckPoint(directory="out")], dataset_sink_mode=False)
    plain = nn.SequentialCell(nn.Dense(6, 5), nn.Dense(5, 4))
    ms.load_param_into_net(plain, {item.name: item for item in net.get_parameters()})
    load_adapter(plain, "out/DELTA_CKP-2_1.ckpt")
    assert plain[0].lora_rank == 2 and plain[0].lora_alpha == 4
    assert np.array_equal(plain(ops.ones((2, 6), ms.float32)).asnumpy(), net(ops.ones((2, 6), ms.float32)).asnumpy())
