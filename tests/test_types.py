"""Types of every kind of layer: to_float(), compute_dtype, mixed precision, what is no float, what overflows."""
from __future__ import annotations

import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, amp, mint, nn, ops
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Model
from nets import MERGED, inputs, numbers, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import LoRAConv2d, LoRADense, LoRAEmbedding, LoRALinear
from mindpet_lite.graph.adapters import deltas

HALF = {"rtol": 5e-3, "atol": 5e-3}
IDS = Tensor(np.array([[1, 3], [4, 1]], np.int32))
LORA = {"lora_rank": 2, "lora_alpha": 4}
PREFIX = mp.PrefixTuningConfig(prefix_token_num=3, embed_dim=4, mid_dim=5, dropout_rate=0, target_modules=["layer"])


class Holder(nn.Cell):
    """A net around one layer."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return self.layer(x)


def lora(**fields) -> mp.LoraConfig:
    return mp.LoraConfig(**{**LORA, "target_modules": ["layer"], **fields})


# The plain layer, its input, the config, and how many rows it puts before a sequence.
KINDS = {
    "dense": (lambda: nn.Dense(6, 4, activation="tanh"), inputs(2, 3, 6), lora, 0),
    "dense with dora": (lambda: nn.Dense(6, 4), inputs(3, 6), lambda: lora(use_dora=True), 0),
    "an activation with parameters": (lambda: nn.Dense(6, 4, activation=nn.PReLU(4)), inputs(3, 6), lora, 0),
    "linear": (lambda: mint.nn.Linear(6, 4), inputs(3, 6), lora, 0),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, has_bias=True), inputs(1, 2, 5, 5), lora, 0),
    "embedding": (lambda: nn.Embedding(6, 4), IDS, lora, 0),
    "one-hot embedding": (lambda: nn.Embedding(6, 4, use_one_hot=True), IDS, lora, 0),
    "adapter": (lambda: nn.Dense(6, 4), inputs(3, 6),
                lambda: mp.AdapterConfig(bottleneck_size=2, target_modules=["layer"]), 0),
    "low-rank adapter": (lambda: nn.Dense(6, 4), inputs(3, 6),
                         lambda: mp.LowRankAdapterConfig(reduction_factor=2, target_modules=["layer"]), 0),
    "prefix tuning": (lambda: nn.Dense(6, 4), inputs(2, 3, 6), lambda: PREFIX, 3),
    "p-tuning v2": (lambda: nn.Dense(6, 4), inputs(2, 3, 6),
                    lambda: mp.Ptuning2Config(pre_seq_len=3, target_modules=["layer"]), 3),
}


@pytest.mark.parametrize("how", ["layer", "net before", "net after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_to_float_starts_as_its_base_in_bits_and_type(kind, how, mode):
    make, x, make_config, rows = KINDS[kind]
    plain = make()
    net = Holder(plain)
    if how == "layer":
        plain.to_float(ms.float16)
    else:
        net.to_float(ms.float16)
    base = net(x)
    if how == "net after":
        net = Holder(make())
        for target, source in zip(net.get_parameters(), plain.get_parameters()):
            target.set_data(source)
    mp.get_pet_model(net, make_config())
    if how == "net after":
        net.to_float(ms.float16)
    start = net(x)
    assert start.dtype == base.dtype == ms.float16
    start = start.asnumpy()[:, rows:] if rows else start.asnumpy()
    if mode == "graph" and kind in ("dense", "an activation with parameters"):
        # The CPU backend computes what has no float16 kernel in float32 and leaves out the roundings between.
        np.testing.assert_allclose(start, base.asnumpy(), rtol=2e-3)
    else:
        assert np.array_equal(start, base.asnumpy())


class Table(nn.Cell):
    """An embedding and a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4).to_float(ms.float16)
        self.fc = nn.Dense(4, 2).to_float(ms.float16)

    def construct(self, ids):
        return self.embed(ids), self.fc(self.embed(ids))


def test_a_table_of_which_tokens_train_keeps_its_type(mode):
    net = Table()
    base = net(IDS)
    mp.get_pet_model(net, mp.LoraConfig(**LORA, target_modules=["fc"], trainable_token_indices={"embed": [1, 5]}))
    for ours, theirs in zip(net(IDS), base):
        assert ours.dtype == theirs.dtype == ms.float16 and np.array_equal(ours.asnumpy(), theirs.asnumpy())


def test_only_some_layers_of_an_attention_can_be_adapted(mode):
    class Attention(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k = (nn.Dense(6, 6, has_bias=False).to_float(ms.float16) for _ in range(2))
            self.matmul = ops.BatchMatMul(transpose_b=True)

        def construct(self, x):
            return self.matmul(self.to_q(x), self.to_k(x))

    net = Attention()
    base = net(inputs(2, 3, 6)).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(**LORA, target_modules=["to_q"]))
    assert np.array_equal(net(inputs(2, 3, 6)).asnumpy(), base)


@pytest.mark.parametrize("compute_dtype", [ms.float16, ms.float32], ids=str)
def test_compute_dtype_holds_inside_a_net_with_to_float(compute_dtype, mode):
    layer = LoRADense(64, 4, **LORA, lora_b_init="normal", compute_dtype=compute_dtype)
    x = inputs(5, 64)
    alone = layer.to_float(ms.float16)(x).asnumpy()
    within = Holder(layer).to_float(ms.float16)(x)
    assert within.dtype == ms.float16 and np.array_equal(within.asnumpy(), alone)
    half = numbers(x.astype(ms.float16))
    exact = half @ (numbers(layer.weight) + 2 * numbers(layer.mindpet_delta_lora_b)
                    @ numbers(layer.mindpet_delta_lora_a)).T + numbers(layer.bias)
    # Rounded once, or after each operator.
    assert (np.abs(alone - exact) <= np.abs(exact) * 2 ** -11 + 1e-7).all() == (compute_dtype == ms.float32)


BY_HAND = {
    "dense": (lambda **own: LoRADense(6, 4, **LORA, activation="tanh", **own),
              lambda: nn.Dense(6, 4, activation="tanh"), inputs(2, 3, 6)),
    "linear": (lambda **own: LoRALinear(6, 4, **LORA, **own), lambda: mint.nn.Linear(6, 4), inputs(3, 6)),
    "convolution": (lambda **own: LoRAConv2d(2, 3, 3, **LORA, has_bias=True, **own),
                    lambda: nn.Conv2d(2, 3, 3, has_bias=True), inputs(1, 2, 5, 5)),
    "embedding": (lambda **own: LoRAEmbedding(6, 4, **LORA, **own), lambda: nn.Embedding(6, 4), IDS),
}


@pytest.mark.parametrize("how, compute_dtype, to_float", [
    ("by hand", ms.float16, None), ("by hand", ms.float32, None), ("injected", ms.float16, None),
    ("injected", ms.float32, ms.float16)], ids=str)
@pytest.mark.parametrize("kind", BY_HAND)
def test_a_merged_layer_computes_in_the_types_of_the_adapted_one(kind, how, compute_dtype, to_float, mode):
    by_hand, plain, x = BY_HAND[kind]
    net = Holder(by_hand(compute_dtype=compute_dtype) if how == "by hand" else plain())
    if to_float:
        net.layer.to_float(to_float)
    kind_of_base = nn.Cell if how == "by hand" else type(net.layer)
    names = [item.name for item in net.get_parameters() if "lora" not in item.name and "scaling" not in item.name]
    if how == "injected":
        mp.get_pet_model(net, lora(compute_dtype=compute_dtype))
    randomise(net)
    given = [x] if x.dtype == ms.int32 else [x, x.astype(ms.float16)]
    before = [net(item) for item in given]
    values = {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}
    mp.merge(net)
    assert [item.name for item in net.get_parameters()] == names and isinstance(net.layer, kind_of_base)
    for item, expected in zip(given, before):
        merged = net(item)
        assert merged.dtype == expected.dtype
        tolerance = MERGED[ms.float16 if ms.float16 in (compute_dtype, merged.dtype) else ms.float32]
        np.testing.assert_allclose(numbers(merged), numbers(expected), **tolerance)
    mp.unmerge(net)
    assert {item.name: item.asnumpy().tobytes() for item in net.get_parameters()} == values
    assert np.array_equal(net(x).asnumpy(), before[0].asnumpy())


def test_a_merged_layer_with_a_compute_dtype_can_be_adapted_again(mode):
    for by_hand, _, x in BY_HAND.values():
        net = mp.merge(Holder(by_hand(compute_dtype=ms.float16)))
        base = net(x)
        mp.get_pet_model(net, lora())
        start = net(x)
        assert start.dtype == base.dtype == ms.float32
        np.testing.assert_allclose(start.asnumpy(), base.asnumpy(), rtol=2e-3 if mode == "graph" else 0, atol=1e-6)


# Whole numbers

INT8 = {
    "dense": (lambda: nn.Dense(6, 4, weight_init="zeros", bias_init="zeros", dtype=ms.int8),
              lambda: LoRADense(6, 4, **LORA, weight_init="zeros", bias_init="zeros", dtype=ms.int8)),
    "linear": (lambda: mint.nn.Linear(6, 4, weight_init="zeros", bias_init="zeros", dtype=ms.int8),
               lambda: LoRALinear(6, 4, **LORA, weight_init="zeros", bias_init="zeros", dtype=ms.int8)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, weight_init="zeros", dtype=ms.int8),
                    lambda: LoRAConv2d(2, 3, 3, **LORA, weight_init="zeros", dtype=ms.int8)),
    "embedding": (lambda: nn.Embedding(6, 4, embedding_table=Tensor(np.zeros((6, 4), np.int8))),
                  lambda: LoRAEmbedding(6, 4, **LORA, embedding_table=Tensor(np.zeros((6, 4), np.int8)))),
}


@pytest.mark.parametrize("kind", INT8)
def test_layers_of_whole_numbers_are_refused(kind):
    plain, by_hand = INT8[kind]
    net = Holder(plain())
    with unchanged(net), pytest.raises(ValueError, match="layer: its (weight|embedding_table) is of the type Int"):
        mp.get_pet_model(net, lora())
    with pytest.raises(TypeError, match="dtype must be a float type.*is of the type Int"):
        by_hand()


@pytest.mark.parametrize("config", [
    mp.AdapterConfig(target_modules=["layer"]), mp.LowRankAdapterConfig(target_modules=["layer"], reduction_factor=2),
    mp.BitFitConfig(target_modules=["layer"]), PREFIX, mp.Ptuning2Config(target_modules=["layer"])],
    ids=lambda config: config.pet_type)
def test_every_method_refuses_a_dense_of_int8(config):
    net = Holder(INT8["dense"][0]())
    with unchanged(net), pytest.raises(ValueError, match="is of the type Int8.*exclude_modules"):
        mp.get_pet_model(net, config)


# Numbers that overflow

@pytest.mark.parametrize("fields", [
    {"lora_alpha": 1e39}, {"lora_alpha": 70000, "param_init_type": ms.float16},
    {"lora_alpha": 70000, "compute_dtype": ms.float16}, {"lora_alpha": 10 ** 400},
    {"lora_alpha": 1e39, "use_rslora": True}], ids=str)
def test_an_alpha_that_overflows_is_refused_when_the_layer_is_made(fields):
    with pytest.raises(ValueError, match="lora_alpha.* (too large|must be below)"):
        LoRADense(6, 4, 1, **fields)
    with pytest.raises(ValueError, match="lora_alpha.* (too large|must be below)"):
        mp.LoraConfig(lora_rank=1, **fields)


def test_an_alpha_that_overflows_in_one_layer_is_refused_by_its_path():
    for layer, fields in ((nn.Dense(6, 4), {"alpha_pattern": {"layer": 70000}, "compute_dtype": ms.float16}),
                          (nn.Dense(6, 4, dtype=ms.float16), {"lora_alpha": 70000}),
                          (nn.Dense(6, 4).to_float(ms.float16), {"lora_alpha": 70000})):
        net = Holder(layer)
        with unchanged(net), pytest.raises(ValueError, match="layer: lora_alpha .* is too large for lora_rank 1"):
            mp.get_pet_model(net, mp.LoraConfig(**{"lora_rank": 1, "target_modules": ["layer"], **fields}))
    mp.get_pet_model(net := Holder(nn.Dense(6, 4)), mp.LoraConfig(lora_rank=1, lora_alpha=65519,
                                                                  compute_dtype=ms.float16, target_modules=["layer"]))
    assert np.isfinite(net(inputs(2, 6)).asnumpy()).all()


@pytest.mark.parametrize("config", [lora(compute_dtype=ms.float16), mp.AdapterConfig(
    target_modules=["layer"], compute_dtype=ms.float16), lora(use_dora=True, compute_dtype=ms.float16)],
    ids=["lora", "adapter", "dora"])
def test_a_strength_that_overflows_is_refused(config):
    net = mp.get_pet_model(Holder(nn.Dense(6, 4)), config)
    for scale in (1e39, 70000, -70000):
        with unchanged(net), pytest.raises(ValueError, match="layer: .*strength.* cannot hold"):
            mp.set_lora_scale(net, scale)
    assert net.layer.strength == 1
    mp.set_lora_scale(net, 30000)


# State of one net and another's

def test_what_is_said_of_one_layers_operators_is_not_said_of_another_nets():
    nets = [mp.get_pet_model(nn.SequentialCell(nn.Dense(6, 6), nn.Dense(6, 4)), mp.LoraConfig(target_modules=["0", "1"],
                                                                                           **LORA)) for _ in range(2)]
    layers = [layer for net in nets for layer in net]
    one, others = layers[0], layers[1:]
    names = ("lora_a_matmul", "lora_b_matmul", "mul", "add", "matmul", "bias_add")
    for name in names:
        getattr(one, name).recompute()
        assert not any(getattr(other, name) is getattr(one, name) for other in others)
        assert not any(getattr(other, name).attrs.get("recompute") for other in others), name
    one.shard(((2, 1), (1, 1)), strategy_lora_dropout=((2, 1),))
    one.set_train()
    for other in others:
        assert not any(cell.training for _, cell in other.cells_and_names())
        assert not hasattr(other, "lora_dropout")
        assert getattr(other.lora_a_matmul, "in_strategy", None) is None
    assert not LoRAConv2d(2, 3, 3, **LORA).cells()


# Mixed precision by MindSpore's own levels

class Two(nn.Cell):
    """Two layers, of which one is adapted."""

    def __init__(self, layer=None) -> None:
        super().__init__()
        self.q, self.v = layer or nn.Dense(6, 6), nn.Dense(6, 4)

    def construct(self, x):
        return self.v(ops.tanh(self.q(x)))


def exact(net: nn.Cell, x: Tensor) -> np.ndarray:
    """Return the output in float64."""
    q, v = net.q, net.v
    weight = numbers(q.weight) + 2 * numbers(q.mindpet_delta_lora_b) @ numbers(q.mindpet_delta_lora_a)
    return np.tanh(numbers(x) @ weight.T + numbers(q.bias)) @ numbers(v.weight).T + numbers(v.bias)


@pytest.mark.parametrize("level", ["O1", "O2", "O3", "auto"])
@pytest.mark.parametrize("how", ["by hand", "injected"])
def test_an_adapted_net_goes_through_auto_mixed_precision(how, level, mode):
    net = Two(LoRADense(6, 6, **LORA)) if how == "by hand" else mp.get_pet_model(
        Two(), mp.LoraConfig(**LORA, target_modules=["q"]))
    randomise(net)
    x = inputs(3, 6)
    expected = exact(net, x)
    np.testing.assert_allclose(numbers(amp.auto_mixed_precision(net, level)(x)), expected, **HALF)


@pytest.mark.parametrize("make, config, x", [
    (lambda: nn.Conv2d(2, 3, 3), lora(), inputs(1, 2, 5, 5)), (lambda: mint.nn.Linear(6, 4), lora(), inputs(3, 6)),
    (lambda: nn.Dense(6, 4), mp.AdapterConfig(bottleneck_size=2, target_modules=["layer"]), inputs(3, 6)),
    (lambda: nn.Dense(6, 4), mp.LowRankAdapterConfig(reduction_factor=2, target_modules=["layer"]), inputs(3, 6)),
    (lambda: nn.Dense(6, 4), PREFIX, inputs(2, 3, 6)), (lambda: nn.Dense(6, 4), lora(use_dora=True), inputs(3, 6))],
    ids=["convolution", "linear", "adapter", "low-rank adapter", "prefix", "dora"])
def test_level_o1_leaves_adapted_layers_their_own_types(make, config, x, graph_mode):
    net = mp.get_pet_model(Holder(make()), config)
    randomise(net)
    expected = net(x).asnumpy()
    np.testing.assert_allclose(amp.auto_mixed_precision(net, "O1")(x).asnumpy(), expected, **HALF)


def test_a_merged_layer_goes_through_level_o1(graph_mode):
    net = mp.merge(mp.get_pet_model(Holder(nn.Dense(6, 4)), lora(compute_dtype=ms.float16)))
    expected = net(inputs(3, 6)).asnumpy()
    assert np.array_equal(amp.auto_mixed_precision(net, "O1")(inputs(3, 6)).asnumpy(), expected)


def test_a_net_of_level_o1_is_refused_with_what_to_do(graph_mode):
    net = amp.auto_mixed_precision(Two(), "O1")
    for config in (mp.LoraConfig(**LORA, target_modules=["q"]), mp.AdapterConfig(target_modules=["q"])):
        with unchanged(net), pytest.raises(ValueError, match="q: mixed precision of level O1 .*adapt the net first"):
            mp.get_pet_model(net, config)


FIRST_OF_A_PROCESS = """import mindspore as ms
from mindspore import amp, nn

import mindpet_lite as mp


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.q = nn.Dense(2, 2)

    def construct(self, x):
        return self.q(x)


net = amp.auto_mixed_precision(Net(), "O1")
assert type(net.q).__name__ == "DenseOpt"
try:
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=1, lora_alpha=1, target_modules=["q"]))
except ValueError as error:
    print(error)
"""


def test_the_first_layer_that_level_o1_writes_in_a_process_is_refused_too(tmp_path):
    (tmp_path / "first.py").write_text(FIRST_OF_A_PROCESS)
    done = subprocess.run([sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "q: mixed precision of level O1 has replaced this Dense by a DenseOpt" in done.stdout, done.stderr


def test_model_trains_an_adapted_net_at_level_o1(graph_mode):
    data = NumpySlicesDataset({"x": np.ones((8, 6), "f4"), "y": np.ones((8, 4), "f4")}).batch(4)
    net = mp.get_pet_model(Two(), mp.LoraConfig(**LORA, target_modules=["q"]))
    frozen = net.v.weight.asnumpy().copy()
    Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 0.01), amp_level="O1", loss_scale_manager=None).train(
        1, data, dataset_sink_mode=False)
    assert list(deltas(net)) == ["q"] and np.any(net.q.mindpet_delta_lora_b.asnumpy())
    assert np.array_equal(net.v.weight.asnumpy(), frozen)
