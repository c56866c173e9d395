"""What only HiRA does: its formula by loops, its starts, dropout, ranks by pattern, and what it refuses."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import inputs, numbers, unchanged

import mindpet_lite as mp
from mindpet_lite.delta.hira import HiRA


def adapted(layer, **settings):
    net = nn.SequentialCell(layer)
    return mp.get_pet_model(net, mp.HiraConfig(target_modules=["0"], **{"r": 2, **settings}))


def factors(net):
    return {name.rpartition("_")[2]: item for name, item in net[0].delta_parameters().items()}


def test_a_convolution_is_the_formula_by_loops(mode):
    net = adapted(nn.Conv2d(2, 3, 3, pad_mode="valid", has_bias=True), init_weights=False)
    x = inputs(1, 2, 4, 5)
    weight, bias, data = numbers(net[0].weight), numbers(net[0].bias), numbers(x)
    a, b = (numbers(factors(net)[name]) for name in "ab")
    wanted = np.zeros((1, 3, 2, 3))
    for out, row, column in np.ndindex(3, 2, 3):
        wanted[0, out, row, column] = bias[out] + sum(
            weight[out, at, y, z] * (1 + sum(b[out, k, 0, 0] * a[k, at, y, z] for k in range(2)))
            * data[0, at, row + y, column + z] for at, y, z in np.ndindex(2, 3, 3))
    np.testing.assert_allclose(net(x).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_table_is_the_formula(mode):
    net = adapted(nn.Embedding(5, 3), init_weights=False)
    a, b = (numbers(factors(net)[name]) for name in "ab")
    assert a.shape == (2, 5) and b.shape == (3, 2)
    table = numbers(net[0].embedding_table)
    ids = np.array([4, 0, 4], np.int32)
    np.testing.assert_allclose(net(Tensor(ids)).asnumpy(), (table * (1 + (b @ a).T))[ids], rtol=1e-5, atol=1e-6)


def test_starts():
    ms.set_seed(0)
    spread = {start: numbers(factors(adapted(nn.Dense(400, 8), r=4, init_weights=start))["a"])
              for start in (True, "gaussian")}
    assert 0.04 < np.abs(spread[True]).max() <= 1 / np.sqrt(400)
    assert abs(spread["gaussian"].std() - 0.25) < 0.02
    table = factors(adapted(nn.Embedding(400, 8), r=4))
    assert not numbers(table["a"]).any() and abs(numbers(table["b"]).std() - 1) < 0.4


def test_dropout_is_of_the_update_in_training_alone(mode):
    ms.set_seed(0)
    net = adapted(nn.Dense(64, 4, has_bias=False), init_weights=False, hira_dropout=0.5)
    x = Tensor(np.eye(64, dtype=np.float32))
    base, full = numbers(net[0].weight).T, numbers(net.set_train(False)(x))
    update = (numbers(net.set_train()(x)) - base) / (full - base)
    # A row of x is one input, so that its mask is that of its whole row of outputs.
    kept = update.round().astype(int)
    assert set(kept.ravel()) == {0, 2} and (kept == kept[:, :1]).all()
    np.testing.assert_allclose(update, kept, atol=1e-3)
    assert not hasattr(adapted(nn.Embedding(5, 3), hira_dropout=0.5)[0], "hira_dropout")


def test_ranks_by_pattern():
    net = nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 4))
    mp.get_pet_model(net, mp.HiraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 3}))
    assert [factors([cell])["a"].shape for cell in net] == [(2, 4), (3, 4)]
    assert isinstance(net[0], HiRA)


def test_groups_are_refused():
    net = nn.SequentialCell(nn.Conv2d(4, 4, 1, group=2))
    with unchanged(net), pytest.raises(ValueError, match="0: HiRA knows no convolution with groups"):
        mp.get_pet_model(net, mp.HiraConfig(target_modules=["0"]))


@pytest.mark.parametrize(("settings", "error"), [
    ({"r": 0}, ValueError), ({"r": True}, TypeError), ({"hira_dropout": 1.0}, ValueError),
    ({"init_weights": "pissa"}, ValueError), ({"init_weights": 1}, ValueError),
    ({"rank_pattern": {"q": 0}}, ValueError)])
def test_wrong_settings(settings, error):
    with pytest.raises(error, match=next(iter(settings)).replace("rank_pattern", "r must be")):
        mp.HiraConfig(target_modules=["0"], **settings)


def test_a_file_goes_into_a_net_with_another_dropout():
    mp.save_adapter(adapted(nn.Dense(4, 4), hira_dropout=0.5, init_weights=False), "adapter")
    net = mp.load_adapter(adapted(nn.Dense(4, 4)), "adapter")
    assert numbers(factors(net)["b"]).any()
    assert mp.load_adapter(nn.SequentialCell(nn.Dense(4, 4)), "adapter")[0].hira_dropout.p == 0.5
