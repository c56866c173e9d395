"""merge and unmerge: plain layers, base names, exactness, refusals."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from nets import LINEAR_PATHS, MERGED, Attention, config, inputs, load_values, numbers, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import LoRADense


def adapted(targets="all-linear", **fields) -> Attention:
    net = mp.get_pet_model(Attention(), config(targets, **fields))
    randomise(net)
    return net


def test_a_merged_net_is_the_bases_kind(mode):
    plain, net = Attention(), adapted()
    before = net(inputs(5, 6)).asnumpy()
    assert mp.merge(net) is net
    np.testing.assert_allclose(net(inputs(5, 6)).asnumpy(), before, **MERGED[ms.float32])
    assert {path: type(cell) for path, cell in net.cells_and_names()} == \
        {path: type(cell) for path, cell in plain.cells_and_names()}
    assert [(item.name, item.shape) for item in net.get_parameters()] == \
        [(item.name, item.shape) for item in plain.get_parameters()]
    ms.save_checkpoint(net, "merged.ckpt")
    assert ms.load_param_into_net(plain, ms.load_checkpoint("merged.ckpt"), strict_load=True) == ([], [])
    assert np.array_equal(plain(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy())


def test_merged_weights_are_the_formulas():
    net = adapted()
    expected = {path: numbers(cell.weight) + 3 / 2 * numbers(cell.mindpet_delta_lora_b)
                @ numbers(cell.mindpet_delta_lora_a)
                for path, cell in net.cells_and_names() if isinstance(cell, LoRADense)}
    assert set(expected) == set(LINEAR_PATHS)
    mp.merge(net)
    for path, value in expected.items():
        np.testing.assert_allclose(numbers(dict(net.cells_and_names())[path].weight), value, rtol=1e-6, atol=1e-7)


def test_unmerge_puts_every_bit_back(mode):
    net = adapted()
    before = net(inputs(5, 6)).asnumpy()
    values = {item.name: (item.asnumpy().tobytes(), item.requires_grad) for item in net.get_parameters()}
    cells = {path: id(cell) for path, cell in net.cells_and_names()}
    for _ in range(3):
        mp.merge(net)
        assert mp.unmerge(net) is net
        assert {item.name: (item.asnumpy().tobytes(), item.requires_grad) for item in net.get_parameters()} == values
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), before)
    assert {path: id(cell) for path, cell in net.cells_and_names()} == cells


def test_training_goes_on_after_unmerge(mode):
    net = mp.unmerge(mp.merge(adapted(["to_q"])))
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.SGD(net.trainable_params(), 0.1)).set_train()
    before = net.to_q.mindpet_delta_lora_b.asnumpy().copy()
    step(inputs(5, 6), inputs(5, 6, seed=1))
    assert not np.array_equal(net.to_q.mindpet_delta_lora_b.asnumpy(), before)


def test_the_scale_goes_in(mode):
    net = adapted()
    mp.set_lora_scale(net, 0.5)
    before = net(inputs(5, 6)).asnumpy()
    mp.merge(net)
    np.testing.assert_allclose(net(inputs(5, 6)).asnumpy(), before, **MERGED[ms.float32])
    mp.unmerge(net)
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), before)
    mp.set_lora_scale(net, 1)
    assert not np.allclose(net(inputs(5, 6)).asnumpy(), before)


def test_what_runs_is_what_is_merged_even_after_a_checkpoint_of_another_alpha(pynative_mode):
    net, other = adapted(), adapted(lora_alpha=9)
    ms.save_checkpoint(net, "net.ckpt")
    with pytest.warns(UserWarning, match="another scaling"):
        ms.load_param_into_net(other, ms.load_checkpoint("net.ckpt"))
    before = other(inputs(5, 6)).asnumpy()
    np.testing.assert_allclose(mp.merge(other)(inputs(5, 6)).asnumpy(), before, **MERGED[ms.float32])


def test_a_shared_layer_is_merged_once(mode):
    class Shared(nn.Cell):
        def __init__(self):
            super().__init__()
            self.first = nn.Dense(6, 6)
            self.box = nn.SequentialCell(self.first)

        def construct(self, x):
            return self.box(self.first(x))

    net = mp.get_pet_model(Shared(), config(["first"]))
    randomise(net)
    before = net(inputs(5, 6)).asnumpy()
    mp.merge(net)
    assert type(net.first) is nn.Dense and net.first is net.box[0]
    np.testing.assert_allclose(net(inputs(5, 6)).asnumpy(), before, **MERGED[ms.float32])
    mp.unmerge(net)
    assert net.first is net.box[0] and np.array_equal(net(inputs(5, 6)).asnumpy(), before)


def test_half_precision_weights(mode):
    net = nn.SequentialCell(nn.Dense(6, 4, dtype=ms.float16))
    mp.get_pet_model(net, config(["0"]))
    randomise(net)
    x = inputs(5, 6, dtype=ms.float16)
    before, weight = net(x).asnumpy(), net[0].weight.asnumpy().copy()
    mp.merge(net)
    assert net[0].weight.dtype == ms.float16
    np.testing.assert_allclose(net(x).asnumpy(), before, **MERGED[ms.float16])
    mp.unmerge(net)
    assert np.array_equal(net[0].weight.asnumpy(), weight)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_a_net_built_by_hand(has_bias, activation, mode):
    net = nn.SequentialCell(LoRADense(6, 4, 2, 3, has_bias=has_bias, activation=activation), nn.Dense(4, 4))
    randomise(net)
    before = net(inputs(5, 6)).asnumpy()
    layer = net[0]
    mp.merge(net)
    assert type(net[0]) is nn.Dense and net[0].weight is layer.weight
    assert [item.name for item in net.get_parameters()] == \
        ["0.weight", *(["0.bias"] if has_bias else []), "1.weight", "1.bias"]
    np.testing.assert_allclose(net(inputs(5, 6)).asnumpy(), before, **MERGED[ms.float32])
    mp.unmerge(net)
    assert net[0] is layer and np.array_equal(net(inputs(5, 6)).asnumpy(), before)


def test_a_layer_that_is_the_net_itself(mode):
    layer = LoRADense(6, 4, 2, 3)
    randomise(layer)
    before = layer(inputs(5, 6)).asnumpy()
    plain = mp.merge(layer)
    assert type(plain) is nn.Dense
    np.testing.assert_allclose(plain(inputs(5, 6)).asnumpy(), before, **MERGED[ms.float32])
    assert mp.unmerge(plain) is layer and np.array_equal(layer(inputs(5, 6)).asnumpy(), before)


def test_a_merged_layer_can_be_adapted_again(mode):
    net = mp.merge(adapted(["to_q"]))
    before = net(inputs(5, 6)).asnumpy()
    mp.get_pet_model(net, config(["to_q"]))
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), before)
    randomise(net, seed=5)
    adapted_output = net(inputs(5, 6)).asnumpy()
    mp.merge(net)
    np.testing.assert_allclose(net(inputs(5, 6)).asnumpy(), adapted_output, **MERGED[ms.float32])
    mp.unmerge(net)
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), adapted_output)


def test_a_net_compiled_around_the_net_sees_merge_and_unmerge(graph_mode):
    net = adapted()
    net.set_train(False)
    around = nn.WithLossCell(net, nn.MSELoss())
    x, y = inputs(5, 6), inputs(5, 6, seed=1)
    before = around(x, y).asnumpy()
    mp.merge(net)
    # Another weight in the merged layer shows that it is the one that runs.
    np.testing.assert_allclose(around(x, y).asnumpy(), before, rtol=1e-5)
    net.to_q.weight.set_data(Tensor(np.zeros((6, 6), np.float32)))
    assert not np.allclose(around(x, y).asnumpy(), before)
    with pytest.warns(UserWarning, match="to_q.weight changed since merge.*load the base after unmerge"):
        mp.unmerge(net)
    assert np.array_equal(around(x, y).asnumpy(), before)


# Refusals

def test_nothing_to_merge_or_unmerge():
    for net in (Attention(), mp.merge(adapted())):
        with unchanged(net), pytest.raises(ValueError, match="no adapted layer"):
            mp.merge(net)
    for net in (Attention(), adapted()):
        with unchanged(net), pytest.raises(ValueError, match="nothing to unmerge"):
            mp.unmerge(net)
    for call in (mp.merge, mp.unmerge):
        with pytest.raises(TypeError, match="Cell"):
            call("net")


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_values_that_are_not_finite_are_not_merged(value):
    net = adapted()
    net.to_k.mindpet_delta_lora_a.set_data(Tensor(np.full((2, 6), value, np.float32)))
    net.to_k.mindpet_delta_lora_b.set_data(Tensor(np.full((6, 2), 4, np.float32)))
    with unchanged(net), pytest.raises(ValueError, match="to_k"):
        mp.merge(net)


def test_an_update_too_large_for_the_weights_type_is_not_merged():
    net = mp.get_pet_model(nn.SequentialCell(nn.Dense(6, 4, dtype=ms.float16)), config(["0"]))
    net[0].mindpet_delta_lora_a.set_data(Tensor(np.full((2, 6), 1e3, np.float32)))
    net[0].mindpet_delta_lora_b.set_data(Tensor(np.full((4, 2), 1e3, np.float32)))
    with unchanged(net), pytest.raises(ValueError, match="does not fit the weight's type"):
        mp.merge(net)


class TiedToEmbedding(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 6)
        self.head = nn.Dense(6, 6, has_bias=False)
        self.head.weight = self.embedding.embedding_table

    def construct(self, ids):
        return self.head(self.embedding(ids))


class TiedDenses(nn.Cell):
    def __init__(self):
        super().__init__()
        self.up = nn.Dense(6, 6)
        self.down = nn.Dense(6, 6)
        self.down.weight = self.up.weight

    def construct(self, x):
        return self.down(self.up(x))


def test_a_tied_weight_is_adapted_but_not_merged(mode):
    net = TiedToEmbedding()
    ids = Tensor(np.arange(4), ms.int32)
    base = net(ids).asnumpy()
    mp.get_pet_model(net, config(["head"]))
    assert net.head.weight is net.embedding.embedding_table and np.array_equal(net(ids).asnumpy(), base)
    names = [item.name for item in net.get_parameters()]
    assert len(set(names)) == len(names)
    randomise(net)
    with unchanged(net), pytest.raises(ValueError, match="head: .* embedding.embedding_table too"):
        mp.merge(net)
    both = mp.get_pet_model(TiedDenses(), config("all-linear"))
    randomise(both)
    with unchanged(both), pytest.raises(ValueError, match="up: .*down.weight too"):
        mp.merge(both)


def test_a_tuple_of_parameters_does_not_tie_weights(pynative_mode):
    class Listed(nn.Cell):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.all = ms.ParameterTuple(inner.get_parameters())

        def construct(self, x):
            return self.inner(x)

    net = Listed(nn.SequentialCell(nn.Dense(6, 6)))
    mp.get_pet_model(net, config(["inner.0"]))
    randomise(net)
    before = net(inputs(5, 6)).asnumpy()
    np.testing.assert_allclose(mp.merge(net)(inputs(5, 6)).asnumpy(), before, **MERGED[ms.float32])
    assert isinstance(net.all[0], Parameter)


def test_unmerge_keeps_the_mode_and_flags_of_the_merged_net(mode):
    x = inputs(5, 6)
    for merged_in, now in ((True, False), (False, True)):
        net = adapted(lora_dropout=0.5).set_train(merged_in)
        mp.merge(net).set_train(now)
        mp.unmerge(net)
        layers = [net.to_q, net.to_q.lora_dropout, net.to_out[0]]
        assert [layer.training for layer in layers] == [now] * 3
        assert np.array_equal(net(x).asnumpy(), net(x).asnumpy()) != now
    net, other = adapted(), adapted().to_float(ms.float16)
    load_values(other, net)
    mp.merge(net).to_float(ms.float16)
    mp.unmerge(net)
    assert np.array_equal(net(x).asnumpy(), other(x).asnumpy())


def test_unmerge_keeps_recomputation_and_hooks_that_were_set_or_taken_back(pynative_mode):
    net, calls = adapted(), []
    mp.merge(net)
    net.to_q.recompute()
    handle = net.to_k.register_forward_hook(lambda cell, inputs, output: calls.append(type(cell)))
    mp.unmerge(net)
    assert net.to_q._recompute_cell is not None and net.to_k._recompute_cell is None
    net(inputs(5, 6))
    assert calls == [LoRADense]
    mp.merge(net)
    mp.undo_recompute(net)
    handle.remove()
    mp.unmerge(net)
    net(inputs(5, 6))
    assert net.to_q._recompute_cell is None and calls == [LoRADense]


class Tied(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embed, self.q, self.head = nn.Embedding(8, 6), nn.Dense(6, 6), nn.Dense(6, 8, has_bias=False)
        self.head.weight = self.embed.embedding_table

    def construct(self, ids):
        return self.head(self.q(self.embed(ids)))


def same_base(source: nn.Cell) -> nn.Cell:
    net = Tied()
    for parameter in net.get_parameters():
        parameter.set_data(Tensor(source.parameters_dict()[parameter.name].asnumpy()))
    return net


def trained_tied(**settings) -> tuple[nn.Cell, nn.Cell, np.ndarray]:
    """Return an adapted net with values, its base, and its output."""
    base = Tied()
    net = mp.get_pet_model(same_base(base), config(["q"], **settings))
    rng = np.random.default_rng(0)
    for parameter in net.trainable_params():
        ops.assign(parameter, Tensor(rng.standard_normal(parameter.shape), ms.float32))
    return net, base, net(IDS).asnumpy()


IDS = Tensor([1, 2, 5], ms.int32)


@pytest.mark.parametrize("side, other", [("embed.embedding_table", "head.weight"),
                                         ("head.weight", "embed.embedding_table")])
def test_a_net_with_one_side_of_a_tie_is_not_merged(side, other, pynative_mode):
    net, base, output = trained_tied(modules_to_save=[side.partition(".")[0]])
    mp.save_adapter(net, "out")
    loaded = mp.load_adapter(same_base(base), "out")
    assert np.array_equal(loaded(IDS).asnumpy(), output)
    for one in (net, loaded):
        with unchanged(one), pytest.raises(ValueError, match=f"tied weights.*read wrongly(.|\n)*{side} was one weight "
                                                             f"with {other}"):
            mp.merge(one)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed", "head"]}, {"freeze_exclude": ["head*"]},
                                      {"freeze_exclude": ["embed*"]}])
def test_a_tie_that_trains_on_both_sides_stays_one_in_files_and_merged(settings, pynative_mode):
    net, base, output = trained_tied(**settings)
    mp.save_adapter(net, "out")
    loaded = mp.load_adapter(same_base(base), "out")
    assert loaded.head.weight is loaded.embed.embedding_table and np.array_equal(loaded(IDS).asnumpy(), output)
    for one in (net, loaded):
        ms.save_checkpoint(mp.merge(one), "merged.ckpt")
        fresh = Tied()
        assert ms.load_param_into_net(fresh, ms.load_checkpoint("merged.ckpt")) == ([], [])
        np.testing.assert_allclose(fresh(IDS).asnumpy(), output, rtol=1e-5, atol=1e-5)
