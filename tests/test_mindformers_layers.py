"""MindFormers' layers as hosts, by classes of its names; `tests/integrations` runs the library's own."""
from __future__ import annotations

import json

import cases_adapter
import formers_layers as fl
import mindspore as ms
import numpy as np
import pytest
from host_layers import IDS
from mindspore import Tensor, nn, ops
from nets import gradient_function, inputs, numbers, unchanged

import mindpet_lite as mp
from mindpet_lite.delta.hosts import host_of, is_linear
from mindpet_lite.delta.hosts.mindformers import (
    FormersEmbedding,
    FormersLinear,
    FormersParallelLinear,
    FormersPynativeLinear,
    FormersVocabEmbedding,
    split_of,
)
from mindpet_lite.graph.adapters import deltas

X = inputs(2, 3, 8)


class Attention(nn.Cell):
    """One of Llama's, with its names."""

    def __init__(self, **settings):
        super().__init__()
        self.wq, self.wk, self.wv = (fl.Linear(8, 8, has_bias=False, **settings) for _ in range(3))
        self.wo = fl.Linear(8, 8, **settings)

    def construct(self, x):
        return self.wo(ops.softmax(self.wq(x) * self.wk(x)) * self.wv(x))


class Llama(nn.Cell):
    """Paths as in MindFormers: model.tok_embeddings, model.layers.0.attention.wq."""

    def __init__(self, **settings):
        super().__init__()
        self.model = nn.Cell()
        self.model.tok_embeddings = fl.LlamaEmbedding(8, 8)
        self.model.layers = nn.CellList([nn.Cell(), nn.Cell()])
        for layer in self.model.layers:
            layer.attention = Attention(**settings)
        self.lm_head = fl.Linear(8, 8, has_bias=False)

    def construct(self, ids):
        x = self.model.tok_embeddings(ids)
        for layer in self.model.layers:
            x = x + layer.attention(x)
        return self.lm_head(x)


class First(nn.Cell):
    """A layer of mcore, of whose two results the parts are added."""

    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def construct(self, x):
        y, bias = self.proj(x)
        return y if bias is None else y + bias


def moved(net, seed=1):
    rng = np.random.default_rng(seed)
    for item in net.trainable_params():
        item.set_data(Tensor((item.asnumpy() + 0.1 * rng.standard_normal(item.shape)).astype(np.float32)))
    return net


def lora(**settings):
    return mp.LoraConfig(2, 6, **{"target_modules": ["proj"], **settings})


def test_layers_are_known_by_class_and_module():
    kinds = {FormersLinear: fl.Linear(8, 4), FormersParallelLinear: fl.RowParallelLinear(8, 4),
             FormersPynativeLinear: fl.PynativeLinear(8, 4), FormersEmbedding: fl.LlamaEmbedding(8, 4),
             FormersVocabEmbedding: fl.VocabEmbedding(8, 4)}
    assert {kind: host_of(cell) for kind, cell in kinds.items()} == {kind: kind for kind in kinds}
    assert [is_linear(cell) for cell in kinds.values()] == [True] * 3 + [False] * 2
    made = type("GLMEmbedding", (fl.LlamaEmbedding,), {"__module__": "research.glm"})
    assert host_of(made(8, 4)) is FormersEmbedding
    for module in ("mindformers.parallel_core.inference.tensor_parallel.layers", "mine.layers", "mindformers.core"):
        for name in ("Linear", "ColumnParallelLinear"):
            assert host_of(type(name, (nn.Cell,), {"__module__": module})()) is None


@pytest.mark.parametrize("settings", [{}, {"has_bias": False}, {"transpose_b": False}, {"activation": "sigmoid"}],
                         ids=str)
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_on_linear_is_the_formula(settings, config, mode):
    if settings.get("has_bias") is False and config.get("lora_bias"):
        pytest.skip("that layer cannot be merged, and has no bias")
    net = nn.SequentialCell(fl.Linear(8, 4, **settings))
    plain, before = net[0], net(X).asnumpy()
    moved(mp.get_pet_model(net, lora(target_modules=["0"], **config)))
    layer = net[0]
    weight = numbers(plain.weight) if plain.transpose_b else numbers(plain.weight).T
    new = weight + 3 * numbers(layer.mindpet_delta_lora_b) @ numbers(layer.mindpet_delta_lora_a)
    if "use_dora" in config:
        new *= (numbers(layer.mindpet_delta_lora_magnitude).reshape(-1) / np.linalg.norm(new, axis=1))[:, None]
    y = numbers(X) @ new.T + (numbers(plain.bias) if plain.has_bias else 0)
    if "lora_bias" in config:
        y = y + 3 * numbers(layer.mindpet_delta_lora_b_bias)
    if "activation" in settings:
        y = 1 / (1 + np.exp(-y))
    found = net(X).asnumpy()
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    assert np.abs(found - before).max() > 1e-2
    mp.merge(net)
    assert net[0] is plain
    np.testing.assert_allclose(net(X).asnumpy(), y, rtol=1e-5, atol=1e-5)
    mp.unmerge(net)
    assert np.array_equal(net(X).asnumpy(), found)


def test_it_computes_in_the_librarys_type_and_gives_that_of_the_input(mode):
    net = nn.SequentialCell(fl.Linear(8, 4, compute_dtype=ms.float16))
    before = net(X)
    mp.get_pet_model(net, lora(target_modules=["0"]))
    assert net(X).dtype == ms.float32 and np.array_equal(net(X).asnumpy(), before.asnumpy())
    assert net[0].mindpet_delta_lora_a.dtype == ms.float32 and not net[0].cost()
    moved(net)
    a, b, w = (numbers(item) for item in (net[0].mindpet_delta_lora_a, net[0].mindpet_delta_lora_b, net[0].weight))
    wanted = numbers(X) @ (w + 3 * b @ a).T + numbers(net[0].bias)
    error = np.abs(net(X).asnumpy() - wanted).max()
    assert 1e-5 < error < 2e-2, "float16 has 11 bits"
    exact = nn.SequentialCell(fl.Linear(8, 4, compute_dtype=ms.float16))
    moved(mp.get_pet_model(exact, lora(target_modules=["0"], compute_dtype=ms.float32)))
    exact[0].mindpet_delta_lora_a.set_data(net[0].mindpet_delta_lora_a)
    exact[0].mindpet_delta_lora_b.set_data(net[0].mindpet_delta_lora_b)
    np.testing.assert_allclose(exact(X).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_llamas_embedding(flat, mode, tmp_path):
    def net():
        return nn.SequentialCell(fl.LlamaEmbedding(8, 4, rmsnorm_compute_2d=flat))

    first = net()
    before = first(IDS).asnumpy()
    assert before.shape == ((6, 4) if flat else (2, 3, 4))
    mp.get_pet_model(first, lora(target_modules=["0"]))
    assert np.array_equal(first(IDS).asnumpy(), before)
    assert [item.name for item in first.trainable_params()] == ["0.mindpet_delta_lora_embedding_a",
                                                                "0.mindpet_delta_lora_embedding_b"]
    moved(first)
    a, b = (numbers(item) for item in first.trainable_params())
    table = numbers(first[0].embedding_weight) + 3 * (b @ a).T
    wanted = table[IDS.asnumpy().reshape(-1)].reshape(before.shape)
    y = first(IDS).asnumpy()
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    mp.save_adapter(first, tmp_path / "a", format="peft")
    assert np.array_equal(mp.load_adapter(net(), tmp_path / "a")(IDS).asnumpy(), y)
    mp.merge(first)
    np.testing.assert_allclose(first(IDS).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"skip_bias_add": True}, {"transpose_b": False},
                                      {"skip_bias_add": True, "transpose_b": False}], ids=str)
@pytest.mark.parametrize("config", [lora(), lora(use_dora=True), mp.IA3Config(target_modules=["proj"]),
                                    mp.BOFTConfig(boft_block_size=4, target_modules=["proj"])],
                         ids=["lora", "dora", "ia3", "boft"])
def test_mcores_layers_give_output_and_bias(settings, config, mode):
    net = First(fl.ColumnParallelLinear(8, 8, **settings))
    plain, before = net.proj, net(X).asnumpy()
    mp.get_pet_model(net, config)
    np.testing.assert_allclose(net(X).asnumpy(), before, rtol=1e-6, atol=1e-6)
    assert {item.name for item in net.get_parameters()} >= {item.name for item in plain.get_parameters()}
    y = moved(net)(X).asnumpy()
    assert np.abs(y - before).max() > 1e-2
    if isinstance(config, mp.LoraConfig) and not config.use_dora:
        weight = numbers(plain.weight) if plain.transpose_b else numbers(plain.weight).T
        new = weight + 3 * numbers(net.proj.mindpet_delta_lora_b) @ numbers(net.proj.mindpet_delta_lora_a)
        wanted = numbers(X) @ new.T + (numbers(plain.bias) if plain.has_bias else 0)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    output, bias = net.proj(X, None)
    assert (bias is not None) == bool(settings.get("skip_bias_add")) and output.shape == (2, 3, 8)
    mp.merge(net)
    assert net.proj is plain
    np.testing.assert_allclose(net(X).asnumpy(), y, rtol=1e-4, atol=1e-5)
    mp.unmerge(net)
    assert np.array_equal(net(X).asnumpy(), y)


@pytest.mark.parametrize("make", [fl.ColumnParallelLinear, fl.RowParallelLinear, fl.PynativeLinear])
def test_adapters_and_prefixes_stand_behind_the_whole_output(make, pynative_mode):
    adapter = mp.AdapterConfig(bottleneck_size=2, non_linearity="tanh", target_modules=["0"])
    prefix = mp.Ptuning2Config(pre_seq_len=2, target_modules=["0"])
    net = nn.SequentialCell(make(8, 4))

    def output(x):
        y = net(x)
        return (y[0] if isinstance(y, tuple) else y).asnumpy()

    plain, before = net[0], output(X)
    mp.get_pet_model(net, adapter)
    assert np.array_equal(output(X), before) and net[0].plain_cell() is plain
    moved(net)
    wanted, _, _ = cases_adapter.of_layer(net[0].bottleneck, before.astype(np.float64), np.ones(before.shape))
    np.testing.assert_allclose(output(X), wanted, rtol=1e-5, atol=1e-5)
    net = mp.get_pet_model(nn.SequentialCell(plain), prefix)
    rows = net[0].mindpet_delta_ptuning2_embedding.embedding_table.asnumpy()
    assert np.array_equal(output(X), np.concatenate([np.stack([rows] * 2), before], 1))


def test_a_bias_that_is_added_outside_would_miss_an_adapter():
    mcore, pynatives = fl.ColumnParallelLinear(8, 4, skip_bias_add=True), fl.PynativeLinear(8, 4)
    pynatives.skip_add_bias = True
    for cell in (mcore, pynatives):
        net = nn.SequentialCell(cell)
        for config in (mp.AdapterConfig(target_modules=["0"]), mp.Ptuning2Config(target_modules=["0"])):
            with unchanged(net), pytest.raises(ValueError, match="bias of this .* is added to its output from outside"):
                mp.get_pet_model(net, config)
    # Without a bias there is nothing to miss.
    net = nn.SequentialCell(fl.ColumnParallelLinear(8, 4, bias=False, skip_bias_add=True))
    mp.get_pet_model(net, mp.AdapterConfig(bottleneck_size=2, target_modules=["0"]))


def test_a_layer_that_is_given_another_weight_says_so(mode):
    net = moved(mp.get_pet_model(First(fl.ColumnParallelLinear(8, 8)), lora()))
    with pytest.raises(ValueError, match="was called with another one: leave it out with exclude_modules"):
        net.proj(X, Tensor(np.zeros((8, 8), np.float32)))
    # With a type of its own a layer without a method stands in the place of the library's.
    first = moved(mp.get_pet_model(First(fl.ColumnParallelLinear(8, 8, skip_bias_add=True)),
                                   lora(compute_dtype=ms.float16)))
    y = first(X).asnumpy()
    mp.merge(first)
    assert type(first.proj) is FormersParallelLinear
    # float16 has 11 bits.
    np.testing.assert_allclose(first(X).asnumpy(), y, rtol=1e-2, atol=2e-2)


def test_pynatives_layers(pynative_mode):
    net = nn.SequentialCell(fl.VocabEmbedding(8, 8), fl.PynativeLinear(8, 4))
    before = net(IDS).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(2, 6, target_modules=["0", "1"]))
    assert np.array_equal(net(IDS).asnumpy(), before)
    moved(net)
    a, b = (numbers(net[0].delta_parameters()[f"mindpet_delta_lora_embedding_{name}"]) for name in "ab")
    table = numbers(net[0].weight) + 3 * (b @ a).T
    new = numbers(net[1].weight) + 3 * numbers(net[1].mindpet_delta_lora_b) @ numbers(net[1].mindpet_delta_lora_a)
    wanted = table[IDS.asnumpy()] @ new.T + numbers(net[1].bias)
    np.testing.assert_allclose(net(IDS).asnumpy(), wanted, rtol=1e-5, atol=1e-5)
    weights = np.random.default_rng(0).standard_normal(wanted.shape)
    slope = gradient_function(net, [net[1].mindpet_delta_lora_b], IDS, weights)()[2][0].asnumpy()
    low = table[IDS.asnumpy()] @ numbers(net[1].mindpet_delta_lora_a).T
    np.testing.assert_allclose(slope, 3 * np.einsum("bso,bsr->or", weights, low), rtol=1e-4, atol=1e-4)
    assert net[1](X, None).shape == (2, 3, 4)
    mp.merge(net)
    np.testing.assert_allclose(net(IDS).asnumpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_and_b_follow_the_hosts_strategy():
    for transposed, weight in ((True, (4, 1)), (False, (1, 4))):
        net = nn.SequentialCell(fl.Linear(8, 8, transpose_b=transposed))
        net[0].matmul.shard(((2, 1), weight))
        mp.get_pet_model(net, lora(target_modules=["0"], lora_dropout=0.1))
        layer = net[0]
        assert layer.matmul.in_strategy == ((2, 1), weight)
        assert layer.lora_a_matmul.in_strategy == ((2, 1), (1, 1))
        assert layer.lora_b_matmul.in_strategy == ((2, 1), (4, 1))
        assert layer.add.in_strategy == ((2, 4), (2, 4)) and layer.mul.in_strategy == ((2, 1), ())
        assert layer.lora_dropout.dropout.in_strategy == ((2, 1),)
    row = nn.SequentialCell(fl.Linear(8, 8))
    row[0].matmul.shard(((2, 4), (1, 4)))
    mp.get_pet_model(row, lora(target_modules=["0"]))
    assert row[0].lora_a_matmul.in_strategy == ((2, 4), (1, 4))
    assert row[0].lora_b_matmul.in_strategy == ((2, 1), (1, 1))


def test_mcores_layers_are_split_as_they_split_themselves(monkeypatch):
    sizes = {"data_parallel_size": 2, "context_parallel_size": 3, "tensor_model_parallel_size": 4}
    none = type("LinearNoTP", (fl.ColumnParallelLinear,), {})
    rows = type("SequenceParallelLinear", (fl.ColumnParallelLinear,), {})
    found = {kind.__name__: split_of(kind(8, 8, **sizes))
             for kind in (fl.ColumnParallelLinear, fl.RowParallelLinear, none, rows)}
    assert found == {"ColumnParallelLinear": ((6, 1), (4, 1)), "RowParallelLinear": ((6, 4), (1, 4)),
                     "LinearNoTP": ((6, 1), (1, 1)), "SequenceParallelLinear": ((24, 1), (1, 1))}
    assert split_of(fl.RowParallelLinear(8, 8, transpose_b=False, **sizes)) == ((6, 4), (4, 1))
    monkeypatch.setattr("mindspore.context.get_auto_parallel_context", lambda name: "semi_auto_parallel")
    net = mp.get_pet_model(First(fl.RowParallelLinear(8, 8, **sizes)), lora())
    assert net.proj.matmul.in_strategy == ((6, 4), (1, 4)) and net.proj.lora_a_matmul.in_strategy == ((6, 4), (1, 4))
    assert net.proj.lora_b_matmul.in_strategy == ((6, 1), (1, 1))


BLOCK = {"pet_type": "lora", "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.05,
         "target_modules": ".*wq|.*wk|.*wv|.*wo"}


def test_mindformers_yaml_block_and_files(mode, tmp_path):
    net = Llama()
    before = net(IDS).asnumpy()
    base = [item.name for item in net.get_parameters()]
    mp.get_pet_model(net, BLOCK)
    paths = [f"model.layers.{block}.attention.{name}" for block in (0, 1) for name in ("wq", "wk", "wv", "wo")]
    assert list(deltas(net)) == paths
    names = [f"{path}.mindpet_delta_lora_{part}" for path in paths for part in "ab"]
    assert [item.name for item in net.trainable_params()] == names
    net.set_train(False)
    assert np.array_equal(net(IDS).asnumpy(), before)
    y = moved(net)(IDS).asnumpy()
    mp.save_adapter(net, tmp_path / "own", format="mindformers")
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4 and config["target_modules"] == ["wk", "wo", "wq", "wv"]
    ms.save_checkpoint(net, str(tmp_path / "all.ckpt"))
    loaded, trained = mp.load_adapter(Llama(), tmp_path / "own"), mp.get_pet_model(Llama(), BLOCK)
    assert ms.load_param_into_net(trained, ms.load_checkpoint(str(tmp_path / "all.ckpt")))[0] == []
    for again in (loaded, trained):
        again.set_train(False)
        assert np.array_equal(again(IDS).asnumpy(), y)
    mp.merge(net)
    np.testing.assert_allclose(net(IDS).asnumpy(), y, rtol=1e-4, atol=1e-4)
    assert [item.name for item in net.get_parameters()] == base


def test_all_linear_means_the_librarys_layers():
    net = mp.get_pet_model(Llama(), lora(target_modules="all-linear"))
    assert len(deltas(net)) == 9


def test_training_moves_a_and_b_alone(mode):
    net = mp.get_pet_model(Llama(), {**BLOCK, "lora_dropout": 0.0})
    before = [(item, item.asnumpy().copy()) for item in net.get_parameters()]
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 1e-2)).set_train()
    losses = [float(step(IDS, Tensor(np.ones((2, 3, 8), np.float32))).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert [item for item, value in before if not np.array_equal(item.asnumpy(), value)] == net.trainable_params()


@pytest.mark.parametrize("transposed", [True, False])
def test_experts_are_named_in_target_parameters(transposed, mode):
    net = nn.SequentialCell(fl.Linear(8, 4, expert_num=3, has_bias=False, transpose_b=transposed))
    x = inputs(3, 2, 8)
    before, weight = net(x).asnumpy(), numbers(net[0].weight)
    weight = weight if transposed else weight.swapaxes(1, 2)
    with unchanged(net), pytest.raises(ValueError, match=r"stack for 3 experts: name it in target_parameters"):
        mp.get_pet_model(net, lora(target_modules=["0"]))
    moved(mp.get_pet_model(net, mp.LoraConfig(2, 4, target_parameters=["0.weight"])))
    found = net(x).asnumpy()
    a, b = (numbers(item) for item in net.trainable_params())
    new = weight + 2 * b.reshape(4, 2, 3).transpose(2, 0, 1) @ a.reshape(3, 2, 8)
    np.testing.assert_allclose(found, np.einsum("eti,eoi->eto", numbers(x), new), rtol=1e-5, atol=1e-5)
    assert np.abs(found - before).max() > 1e-2


def test_what_cannot_be_adapted_is_refused_with_a_reason():
    parted = fl.PynativeLinear(8, 4)
    parted.weight.to_local = lambda: None
    shared = fl.VocabEmbedding(8, 4)
    shared.enable_embedding_tp = True
    other = type("Linear", (fl.Linear,), {"construct": lambda self, x: x, "__module__": "research.other"})
    for cell, text in ((fl.ColumnParallelLinear(8, 4, weight=False), "no weight of its own"),
                       (parted, "DTensor.*before it is parallelised"), (shared, "processes share this table"),
                       (other(8, 4), "Linear overrides MindFormers' Linear.construct")):
        net = nn.SequentialCell(cell)
        with unchanged(net), pytest.raises(ValueError, match=text):
            mp.get_pet_model(net, lora(target_modules=["0"]))
