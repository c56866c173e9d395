"""get_pet_model: what targets mean, where layers stand, before and after first calls, refusals."""
from __future__ import annotations

import code
import collections
import gc
import re
from pathlib import Path

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops
from nets import LINEAR_PATHS, Attention, base_parameters, config, inputs, numbers, randomise, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import LoRADense


class Llama(nn.Cell):
    """Names as MindFormers has them."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.layers = nn.CellList()
        for _ in range(layers):
            block = nn.Cell()
            block.attention = nn.Cell()
            for name in ("wq", "wk", "wv", "wo", "wq2"):
                setattr(block.attention, name, nn.Dense(4, 4, has_bias=False))
            block.feed_forward = nn.Dense(4, 4)
            self.layers.append(block)
        self.lm_head = nn.Dense(4, 4)


def adapted_paths(net: nn.Cell) -> set[str]:
    return {path for path, cell in net.cells_and_names() if isinstance(cell, LoRADense)}


def refusal(net: nn.Cell, *args, **fields) -> str:
    with unchanged(net), pytest.raises((TypeError, ValueError)) as caught:
        mp.get_pet_model(net, config(*args, **fields))
    return str(caught.value)


def squared_sum(net):
    def loss(x):
        return net(x).sum() ** 2
    return loss


# What targets mean

@pytest.mark.parametrize("targets, expected", [
    (".*wq|.*wv", {f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("wq", "wv")}),
    (r"layers\.1\..*\.w[qk]", {"layers.1.attention.wq", "layers.1.attention.wk"}),
    ("lm_head", {"lm_head"}),
    (["wq"], {"layers.0.attention.wq", "layers.1.attention.wq"}),
    (["attention.wq", "lm_head"], {"layers.0.attention.wq", "layers.1.attention.wq", "lm_head"}),
    (("layers.0.attention.wo",), {"layers.0.attention.wo"}),
    ({"wo", "lm_head"}, {"layers.0.attention.wo", "layers.1.attention.wo", "lm_head"}),
    (["wq", "attention.wq"], {"layers.0.attention.wq", "layers.1.attention.wq"}),
    ("all-linear", {f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("wq", "wk", "wv", "wo", "wq2")}
     | {"layers.0.feed_forward", "layers.1.feed_forward", "lm_head"}),
])
def test_targets(targets, expected):
    net = Llama()
    assert mp.get_pet_model(net, config(targets)) is net
    assert adapted_paths(net) == expected


@pytest.mark.parametrize("exclude, left", [
    (["lm_head"], "lm_head"), ("lm_head|.*feed_forward", "layers.1.feed_forward"),
    (["layers.1.attention.wq2", "lm_head"], "layers.1.attention.wq2")])
def test_exclude(exclude, left):
    net = Llama()
    mp.get_pet_model(net, config("all-linear", exclude_modules=exclude))
    assert left not in adapted_paths(net) and "layers.0.attention.wq" in adapted_paths(net)


def test_settings_reach_the_layer():
    net = Llama()
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=3, lora_alpha=7, lora_dropout=0.25, lora_a_init="ones",
                                        lora_b_init=0.5, param_init_type=ms.float16, compute_dtype=ms.float32,
                                        target_modules=["lm_head"]))
    layer = net.lm_head
    assert (layer.lora_rank, layer.lora_alpha, layer.lora_dropout.p) == (3, 7, 0.25)
    assert layer.compute_dtype == ms.float32 and layer.mindpet_delta_lora_a.dtype == ms.float16
    assert np.all(layer.mindpet_delta_lora_a.asnumpy() == 1) and np.all(layer.mindpet_delta_lora_b.asnumpy() == 0.5)


def test_defaults_are_rank_8_alpha_16_no_dropout():
    layer = mp.get_pet_model(nn.SequentialCell(nn.Dense(8, 8)), mp.LoraConfig(target_modules=["0"]))[0]
    assert (layer.lora_rank, layer.lora_alpha, layer.dropout_rate, layer.has_dropout) == (8, 16, 0, False)


# YAML

MINDFORMERS = """
# model config
model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    pet_config:
      pet_type: lora
      # configuration of lora
      lora_rank: 16
      lora_alpha: 16
      lora_dropout: 0.05
      target_modules: '.*wq|.*wk|.*wv|.*wo'
  arch:
    type: LlamaForCausalLM
"""
MINDFORMERS_FREEZE = """
model:
  model_config:
    pet_config:
      pet_type: lora
      lora_rank: 2
      lora_alpha: 16
      lora_dropout: 0.0
      lora_a_init: 'normal'
      lora_b_init: 'zeros'
      target_modules: '.*wq|.*wk|.*wv|.*wo'
      freeze_include: ['*']
      freeze_exclude: ['*lora*']
"""


def write(text: str) -> Path:
    Path("pet.yaml").write_text(text, encoding="utf-8")
    return Path("pet.yaml")


@pytest.mark.filterwarnings("ignore:lora_rank")
def test_mindformers_block_works_as_written():
    net = mp.get_pet_model(Llama(), write(MINDFORMERS))
    assert adapted_paths(net) == {f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("wq", "wk", "wv", "wo")}
    layer = net.layers[0].attention.wq
    assert (layer.lora_rank, layer.lora_alpha, layer.lora_dropout.p) == (16, 16, 0.05)


def test_mindformers_block_with_freeze_lists_works_as_written():
    net = mp.get_pet_model(Llama(), str(write(MINDFORMERS_FREEZE)))
    assert len(net.trainable_params()) == 16
    assert all("mindpet_delta_lora" in item.name for item in net.trainable_params())


def test_top_level_block_mapping_and_config_are_the_same():
    write("pet_config:\n  pet_type: LoRA\n  r: 2\n  lora_alpha: 3\n  target_modules: [to_q, to_k]\n")
    block = {"pet_type": "lora", "lora_rank": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_k"]}
    for given in ("pet.yaml", block, {"pet_config": block}, config(["to_q", "to_k"])):
        net = mp.get_pet_model(Attention(), given)
        assert adapted_paths(net) == {"to_q", "to_k"} and net.to_q.lora_rank == 2 and net.to_q.lora_alpha == 3


# Where layers stand, names, modes, first calls

@pytest.mark.parametrize("called_before", [False, True])
def test_every_place_takes_effect_and_names_stay(called_before, mode):
    net = Attention()
    names = [item.name for item in net.get_parameters()]
    x = inputs(5, 6)
    base = net(x).asnumpy() if called_before else None
    mp.get_pet_model(net, config("all-linear"))
    assert adapted_paths(net) == set(LINEAR_PATHS)
    assert [item.name for item in base_parameters(net)] == names
    all_names = [item.name for item in net.get_parameters()]
    assert len(set(all_names)) == len(all_names)
    if called_before:
        assert np.array_equal(net(x).asnumpy(), base)
    before = net(x).asnumpy()
    for path in LINEAR_PATHS:
        layer = dict(net.cells_and_names())[path]
        layer.mindpet_delta_lora_b.set_data(Tensor(np.ones(layer.mindpet_delta_lora_b.shape, np.float32)))
        after = net(x).asnumpy()
        assert not np.allclose(after, before, atol=1e-6), f"the layer at {path} does not run"
        before = after


class SharedTwice(nn.Cell):
    def __init__(self):
        super().__init__()
        self.first = nn.Dense(6, 6, activation="tanh")
        self.again = self.first
        self.box = nn.SequentialCell(self.first, nn.Dense(6, 6))

    def construct(self, x):
        return self.box(self.again(self.first(x)))


@pytest.mark.parametrize("target", [["first"], ["again"], ["box.0"], ["first", "again", "box.0"], "first|again"])
def test_a_layer_under_several_names_is_adapted_once_everywhere(target, mode):
    net = SharedTwice()
    x = inputs(5, 6)
    base = net(x).asnumpy()
    names = [item.name for item in net.get_parameters()]
    mp.get_pet_model(net, config(target))
    assert isinstance(net.first, LoRADense) and net.first is net.again is net.box[0] is net.box.cell_list[0]
    assert len(net.trainable_params()) == 2
    assert [item.name for item in base_parameters(net)] == names
    assert np.array_equal(net(x).asnumpy(), base)
    randomise(net)
    layer = net.first
    step = nn.SequentialCell(layer)
    expected = net.box[1](step(step(step(x)))).asnumpy()
    np.testing.assert_allclose(net(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)


def test_excluding_one_name_of_a_shared_layer_excludes_the_layer():
    net = SharedTwice()
    mp.get_pet_model(net, config("all-linear", exclude_modules=["again"]))
    assert adapted_paths(net) == {"box.1"}


class Shelves(nn.Cell):
    """Cells the user keeps in containers of Python beside their proper names."""

    def __init__(self):
        super().__init__()
        self.q = nn.Dense(6, 6)
        self.k = nn.Dense(6, 6)
        self.listed = [self.q, (self.k, self.q)]
        self.named = {"q": self.q, "deep": [{"k": self.k}]}

    def construct(self, x):
        return self.listed[0](x) + self.named["deep"][0]["k"](x)


def test_python_containers_beside_the_names_follow(pynative_mode):
    net = Shelves()
    before = net(inputs(5, 6)).asnumpy()
    mp.get_pet_model(net, config(["q", "k"]))
    assert net.listed[0] is net.q and net.listed[1] == (net.k, net.q)
    assert net.named["q"] is net.q and net.named["deep"][0]["k"] is net.k
    for layer in (net.q, net.k):
        randomise(layer)
        after = net(inputs(5, 6)).asnumpy()
        assert not np.allclose(after, before)
        before = after


def test_a_cell_in_a_python_list_only_is_no_target():
    class Hidden(nn.Cell):
        def __init__(self):
            super().__init__()
            self.shown = nn.Dense(6, 6)
            self.hidden = [nn.Dense(6, 6)]

    assert "hits nothing" in refusal(Hidden(), ["hidden.0"])


@pytest.mark.parametrize("build", [
    lambda: nn.CellDict({"q": nn.Dense(6, 6), "k": nn.Dense(6, 6)}),
    lambda: nn.SequentialCell(collections.OrderedDict(q=nn.Dense(6, 6), k=nn.Dense(6, 6)))],
    ids=["CellDict", "SequentialCell of an OrderedDict"])
def test_named_containers(build):
    net = build()
    mp.get_pet_model(net, config(["q"]))
    assert adapted_paths(net) == {"q"} and isinstance(net["q"] if isinstance(net, nn.CellDict) else net[0], LoRADense)


class Appended(nn.Cell):
    def __init__(self):
        super().__init__()
        self.input_blocks = nn.CellList()
        for _ in range(3):
            block = nn.CellList()
            block.append(nn.SequentialCell(nn.Dense(6, 6), nn.Dense(6, 6)))
            self.input_blocks.append(block)

    def construct(self, x):
        for block in self.input_blocks:
            for cell in block:
                x = cell(x)
        return x


class Colliding(nn.Cell):
    """Two containers whose Parameters bear the same names."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.left = nn.SequentialCell(nn.Dense(6, 6, has_bias=False))
        self.right = nn.SequentialCell(nn.Dense(6, 6, has_bias=False))

    def construct(self, x):
        return self.right(self.left(x))


def test_names_by_path_where_parameter_names_differ(mode):
    net = Appended()
    names = [item.name for item in net.get_parameters()]
    base = net(inputs(5, 6)).asnumpy()
    mp.get_pet_model(net, config("all-linear"))
    assert len(adapted_paths(net)) == 6
    assert [item.name for item in base_parameters(net)] == names
    all_names = [item.name for item in net.get_parameters()]
    assert len(set(all_names)) == len(all_names)
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), base)
    randomise(net)
    mp.save_adapter(net, "adapter")
    other = Appended()
    for ours, theirs in zip(other.get_parameters(), base_parameters(net)):
        ours.set_data(Tensor(theirs.asnumpy()))
    mp.load_adapter(other, "adapter")
    assert np.array_equal(other(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy())


def test_deltas_get_names_of_their_own_where_base_names_collide():
    net = Colliding()
    assert len({item.name for item in net.get_parameters()}) == 1
    mp.get_pet_model(net, config("all-linear"))
    added = [item.name for item in net.get_parameters()][2:]
    assert len(set(added)) == len(added) == 6


def test_a_base_checkpoint_loads_before_or_after_injection(pynative_mode):
    source = Attention()
    ms.save_checkpoint(source, "base.ckpt")
    before, after = Attention(), Attention()
    ms.load_param_into_net(before, ms.load_checkpoint("base.ckpt"))
    for net in (before, after):
        mp.get_pet_model(net, config("all-linear"))
    unloaded, unread = ms.load_param_into_net(after, ms.load_checkpoint("base.ckpt"))
    assert unread == [] and not {item.name for item in source.get_parameters()} & set(unloaded)
    for net in (before, after):
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), source(inputs(5, 6)).asnumpy())


# Nets around the net that were compiled before

def test_a_loss_cell_compiled_before_sees_the_change(mode):
    net = Attention().set_train(False)
    around = nn.WithLossCell(net, nn.MSELoss())
    x, y = inputs(5, 6), inputs(5, 6, seed=1)
    base = float(around(x, y).asnumpy())
    mp.get_pet_model(net, config("all-linear"))
    assert float(around(x, y).asnumpy()) == base
    randomise(net)
    assert float(around(x, y).asnumpy()) != base


def test_a_gradient_function_compiled_before_sees_the_change(mode):
    net = Attention().set_train(False)
    weights = [net.to_q.weight]
    function = ms.value_and_grad(squared_sum(net), None, weights)
    base, base_gradients = function(inputs(5, 6))
    mp.get_pet_model(net, config("all-linear"))
    randomise(net)
    net.to_q.weight.requires_grad = True
    value, gradients = function(inputs(5, 6))
    assert not np.allclose(value.asnumpy(), base.asnumpy())
    assert not np.allclose(gradients[0].asnumpy(), base_gradients[0].asnumpy())
    fresh = ms.value_and_grad(squared_sum(net), None, weights)(inputs(5, 6))
    np.testing.assert_allclose(value.asnumpy(), fresh[0].asnumpy(), rtol=1e-5)


def test_a_jit_function_compiled_before_sees_the_change(mode):
    net = Attention().set_train(False)

    @ms.jit
    def run(x):
        return net(x)

    base = run(inputs(5, 6)).asnumpy()
    mp.get_pet_model(net, config("all-linear"))
    randomise(net)
    np.testing.assert_allclose(run(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy(), rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(inputs(5, 6)).asnumpy(), base)


def test_a_model_that_trained_and_predicted_before_sees_the_change(mode):
    net = nn.SequentialCell(nn.Dense(6, 4), nn.Dense(4, 2))
    x = inputs(4, 6).asnumpy()

    def data():
        return ds.NumpySlicesDataset({"x": x, "y": np.zeros((4, 2), np.float32)}, shuffle=False).batch(2)

    model = ms.train.Model(net, nn.MSELoss(), nn.SGD(net.trainable_params(), 0.1))
    model.train(1, data(), dataset_sink_mode=False)
    before = model.predict(Tensor(x)).asnumpy()
    mp.get_pet_model(net, config(["0"]))
    assert np.array_equal(model.predict(Tensor(x)).asnumpy(), before)
    randomise(net)
    assert not np.allclose(model.predict(Tensor(x)).asnumpy(), before)
    frozen = net[0].weight.asnumpy().copy()
    model = ms.train.Model(net, nn.MSELoss(), nn.SGD(net.trainable_params(), 0.1))
    delta = net[0].mindpet_delta_lora_a.asnumpy().copy()
    model.train(1, data(), dataset_sink_mode=False)
    assert np.array_equal(net[0].weight.asnumpy(), frozen)
    assert not np.array_equal(net[0].mindpet_delta_lora_a.asnumpy(), delta)


# What the replaced layer carried

def count_call(cell, args, output):
    HOOKED.append(type(cell).__name__)


HOOKED: list[str] = []


def test_forward_hooks_stay(pynative_mode):
    HOOKED.clear()
    net = Attention()
    net.to_q.register_forward_hook(count_call)
    net(inputs(5, 6))
    mp.get_pet_model(net, config(["to_q"]))
    net(inputs(5, 6))
    mp.merge(net)
    net(inputs(5, 6))
    mp.unmerge(net)
    net(inputs(5, 6))
    assert HOOKED == ["Dense", "LoRADense", "Dense", "LoRADense"]


@pytest.mark.parametrize("where", [lambda net: net, lambda net: net.box, lambda net: net.box[0]],
                         ids=["net", "container", "layer"])
def test_recomputation_set_before_injection(where, mode):
    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.box = nn.SequentialCell(nn.Dense(6, 6, activation="tanh"), nn.Dense(6, 4))

        def construct(self, x):
            return self.box(x)

    plain, net = Net(), Net()
    ms.load_param_into_net(net, {item.name: Parameter(item.asnumpy().copy(), name=item.name)
                                 for item in plain.get_parameters()})
    where(net).recompute()
    found = []
    for each in (plain, net):
        mp.get_pet_model(each, config(["box.0"]))
        randomise(each)
        found.append(ms.value_and_grad(squared_sum(each), None, each.trainable_params())(inputs(5, 6)))
    for expected, ours in zip(found[0][1], found[1][1]):
        assert np.any(ours.asnumpy())
        np.testing.assert_allclose(ours.asnumpy(), expected.asnumpy(), rtol=1e-5, atol=1e-6)


# Refusals

def test_second_injection_on_the_same_layer_is_refused():
    net = Attention()
    mp.get_pet_model(net, config(["to_q"]))
    assert "to_q: a LoRADense is adapted already" in refusal(net, ["to_q"])
    assert "to_q: a LoRADense is adapted already" in refusal(net, ["to_q", "to_k"])
    mp.get_pet_model(net, config(["to_k"]))
    assert adapted_paths(net) == {"to_q", "to_k"} and len(net.trainable_params()) == 4
    mp.get_pet_model(net, config("all-linear"))
    assert adapted_paths(net) == set(LINEAR_PATHS)
    assert "no linear layer that is not adapted yet" in refusal(net, "all-linear")


class Foreign(nn.Cell):
    """Another library's linear layer, its weight (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones((6, 6), np.float32)))

    def construct(self, x):
        return ops.matmul(x, self.weight)


class Head(nn.Cell):
    """A language model whose head is tied, or told by its class."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.q, self.lm_head = nn.Embedding(8, 6), nn.Dense(6, 6), nn.Dense(6, 8, has_bias=False)
        self.tied = tied
        if tied:
            self.lm_head.weight = self.embed.embedding_table

    def get_output_embeddings(self):
        if self.tied:
            raise NotImplementedError
        return self.lm_head

    def construct(self, ids):
        return self.lm_head(self.q(self.embed(ids)))


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_out_the_output_head(tied):
    for net, path in ((Head(tied), "q"), (nn.SequentialCell(Head(tied)), "0.q")):
        mp.get_pet_model(net, config("all-linear"))
        assert adapted_paths(net) == {path}
        # The head can be named.
        mp.get_pet_model(net, config(["lm_head"]))


def test_all_linear_names_the_linear_layers_that_it_cannot_adapt():
    net = nn.SequentialCell(nn.Dense(6, 6), Foreign(), nn.Embedding(6, 6), mint.nn.Embedding(6, 6), nn.LayerNorm((6,)))
    message = refusal(net, "all-linear")
    assert "1: LoRA adapts nn.Dense, not Foreign" in message and len(message.splitlines()) == 2
    mp.get_pet_model(net, config("all-linear", exclude_modules=["1"]))
    assert adapted_paths(net) == {"0"}
    net = nn.SequentialCell(nn.Dense(6, 6), mint.nn.Linear(6, 6))
    mp.get_pet_model(net, mp.AdapterConfig(bottleneck_size=2, target_modules="all-linear"))
    assert [type(cell).__name__ for cell in net] == ["AdapterDense", "AdapterLinear"]
    message = refusal(nn.SequentialCell(nn.ReLU()), "all-linear")
    assert "no linear layer but its output head" in message and "not adapted yet" not in message


@pytest.mark.parametrize("fields, message", [
    ({"rank_pattern": {"wv": 3, "vv": 2}}, "rank_pattern 'vv' hits no adapted layer.*such as 'layers.0.attention.wq'"),
    ({"alpha_pattern": {"w_q": 3}}, "alpha_pattern 'w_q' hits no adapted layer.*Did you mean 'wq'"),
    ({"rank_pattern": {"wo": 3}}, "rank_pattern 'wo' hits no adapted layer"),
    ({"layers_to_transform": [1, 7]}, "layers_to_transform has 7, but no layer of target_modules is in such a block"),
    ({"layers_to_transform": [1], "layers_pattern": ["layers", "blokcs"]}, "layers_pattern 'blokcs' hits no list"),
])
def test_what_hits_nothing_is_an_error(fields, message):
    assert re.search(message, refusal(Llama(), ["wq", "wv"], **fields))


@pytest.mark.parametrize("targets, expected", [
    (["to_qq"], "'to_qq' hits nothing.*Did you mean 'to_q'"), (["q"], "'q' hits nothing"),
    ("to_qq", "'to_qq' hits nothing.*Did you mean 'to_q'"), ("to_", "hits nothing"), ("(", "no regular expression"),
    ("all_linear", "'all_linear' hits nothing.*such as 'to_q'"),
    (["to_q", "to_zz"], "'to_zz' hits nothing"), (["to_out"], "hits SequentialCell at to_out.*to_out.0"),
    (["norm"], "LoRA adapts nn.Dense, not LayerNorm"), (".*", "norm: LoRA adapts nn.Dense, not LayerNorm"),
    (["to_out.1"], "Dropout"), (None, "target_modules is missing"),
])
def test_targets_that_hit_nothing_or_the_wrong_thing(targets, expected):
    message = refusal(Attention(), targets)
    assert re.search(expected, message), message
    assert "unchanged" in message


def test_all_problems_stand_in_one_message():
    message = refusal(Attention(), ["to_qq", "norm", "to_out", "blocks.0"], exclude_modules=["nowhere"],
                      freeze_exclude=["*no such*"], lora_a_init=Tensor(np.zeros((2, 5), np.float32)))
    for part in ("'to_qq' hits nothing", "norm: LoRA adapts nn.Dense", "'to_out' hits SequentialCell",
                 "exclude_modules entry 'nowhere' hits nothing", "freeze_exclude pattern '*no such*'",
                 "blocks.0: lora_a_init must be a Tensor of shape (2, 6), but got shape (2, 5)"):
        assert part in message, message


def test_an_initial_tensor_that_fits_some_layers_only_changes_nothing(mode):
    net = nn.SequentialCell(nn.Dense(6, 6), nn.Dense(6, 4), nn.Dense(4, 6))
    before = net(inputs(5, 6)).asnumpy()
    message = refusal(net, "all-linear", lora_a_init=Tensor(np.zeros((2, 6), np.float32)))
    assert "2: lora_a_init" in message and "0: " not in message and "1: " not in message
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), before)
    assert len(net.trainable_params()) == 6


def test_everything_excluded_is_refused():
    assert "all of its hits are excluded" in refusal(Attention(), ["to_q"], exclude_modules=["to_q"])


def test_a_dense_that_overrides_construct_is_refused():
    class Own(nn.Dense):
        def construct(self, x):
            return super().construct(x)

    net = nn.SequentialCell(Own(6, 6), nn.Dense(6, 6))
    assert "0: Own overrides nn.Dense.construct" in refusal(net, "all-linear")
    mp.get_pet_model(net, config("all-linear", exclude_modules=["0"]))
    assert adapted_paths(net) == {"1"}


def test_the_net_itself_cannot_be_the_layer():
    assert "from_dense" in refusal(nn.Dense(6, 6), "all-linear")


@pytest.mark.parametrize("net", ["net", None, [nn.Dense(2, 2)]])
def test_a_non_cell_is_refused(net):
    with pytest.raises(TypeError, match="mindspore.nn.Cell"):
        mp.get_pet_model(net, config("all-linear"))


@pytest.mark.parametrize("given", [None, 3, mp.LoraConfig, ["to_q"]])
def test_a_non_config_is_refused(given):
    with pytest.raises(TypeError, match="config"):
        mp.get_pet_model(Attention(), given)


# What trains

def test_freeze_lists():
    net = mp.get_pet_model(Attention(), config(["to_q"], freeze_include=["*k.bias"],
                                               freeze_exclude=["norm.*", "*bias"]))
    trains = {item.name for item in net.trainable_params()}
    assert {"norm.gamma", "norm.beta", "to_q.mindpet_delta_lora_a", "blocks.0.bias"} <= trains
    assert "to_k.bias" not in trains and "to_k.weight" not in trains
    assert "leaves nothing trainable" in refusal(Attention(), ["to_q"], freeze_include=["*"])


def test_earlier_deltas_keep_training():
    net = mp.get_pet_model(Attention(), config(["to_q"]))
    mp.get_pet_model(net, config(["to_k"]))
    assert len(net.trainable_params()) == 4
    mp.freeze_modules(net, include=["to_q*lora*"])
    mp.get_pet_model(net, config(["blocks.0"]))
    assert {item.name.split(".mindpet")[0] for item in net.trainable_params()} == {"to_k", "blocks.0"}


def test_a_terminal_shows_the_summary_once(capsys):
    terminal = code.InteractiveConsole({"mp": mp, "net": mp.get_pet_model(Attention(), config(["to_q"]))})
    terminal.push("mp.summary(net)")
    shown = capsys.readouterr().out
    assert shown.count("to_q") == 1 and shown.count("adapted layers") == 1 and "<Summary of 1 layers>" in shown


def test_summary(capsys):
    net = mp.get_pet_model(SharedTwice(), config(["first"]))
    found = mp.summary(net)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n" and len(found.rows) == 1
    for part in ("first", "LoRADense", "lora_rank=2", "lora_alpha=3", "(2, 6) (6, 2)", "24", "1 adapted layers",
                 "trainable params: 24 || all params: 108 || trainable%: 22.2222"):
        assert part in printed, printed
    mp.set_lora_scale(net, 0.5)
    assert "strength=0.5" in str(mp.summary(net))
    assert "casts" not in printed
    half = mp.get_pet_model(SharedTwice(), config(["first"], compute_dtype=ms.float16))
    assert "casts its Float32 weight to Float16 on every call" in str(mp.summary(half))
    assert mp.summary(nn.Dense(2, 2)).rows == ()
    with pytest.raises(TypeError, match="Cell"):
        mp.summary("net")


# PEFT's own numbers

def test_single_layers_of_a_peft_model(shared, mode):
    from safetensors.numpy import load_file
    folder = shared / "fixtures/peft/llama_tiny"
    base = load_file(folder / "base/model.safetensors")
    delta = load_file(folder / "lora_plain/adapter_model.safetensors")
    merged = np.load(folder / "lora_plain/io.npz")
    for name in ("q_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        weight = base[f"{path}.weight"]
        dense = nn.Dense(weight.shape[1], weight.shape[0], weight_init=Tensor(weight), has_bias=False)
        net = mp.get_pet_model(nn.SequentialCell(dense), config(["0"], lora_rank=4, lora_alpha=8))
        net[0].mindpet_delta_lora_a.set_data(Tensor(delta[f"base_model.model.{path}.lora_A.weight"]))
        net[0].mindpet_delta_lora_b.set_data(Tensor(delta[f"base_model.model.{path}.lora_B.weight"]))
        expected = merged[f"merged_weight.{path}.weight"]
        x = inputs(3, weight.shape[1])
        np.testing.assert_allclose(net(x).asnumpy(), numbers(x) @ expected.T.astype(np.float64), rtol=1e-4, atol=1e-5)
        mp.merge(net)
        np.testing.assert_allclose(net[0].weight.asnumpy(), expected, rtol=0, atol=1e-7)
        assert ops.abs(net[0].weight - Tensor(weight)).max() > 1e-3


class Stack(nn.Cell):
    """Blocks in a list of blocks, as in a transformer or a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.CellList([nn.CellList([Attention() for _ in range(2)]) for _ in range(3)])
        self.head = nn.Dense(6, 6)


@pytest.mark.parametrize("fields, expected", [
    ({"layers_to_transform": 1}, {"layers.0.1.to_q", "layers.1.1.to_q", "layers.2.1.to_q"}),
    ({"layers_to_transform": [0, 2], "layers_pattern": "layers"},
     {"layers.0.0.to_q", "layers.0.1.to_q", "layers.2.0.to_q", "layers.2.1.to_q"}),
    ({"layers_to_transform": [2], "layers_pattern": ["layers"]},
     {"layers.2.0.to_q", "layers.2.1.to_q"}),
])
def test_layers_to_transform_chooses_blocks(fields, expected):
    net = mp.get_pet_model(Stack(), config(["to_q"], **fields))
    assert {path for path, cell in net.cells_and_names() if isinstance(cell, LoRADense)} == expected


def test_a_layer_by_its_whole_path_needs_no_block_number():
    net = mp.get_pet_model(Stack(), config(["to_q", "head"], layers_to_transform=[1], layers_pattern="layers"))
    assert isinstance(net.head, LoRADense)


@pytest.mark.parametrize("fields, error, message", [
    ({"layers_to_transform": [7]}, ValueError, "'to_q' hits no layer in blocks 7"),
    ({"layers_to_transform": [-1]}, TypeError, "layers_to_transform must be a block number"),
    ({"layers_to_transform": []}, TypeError, "layers_to_transform"),
    ({"layers_to_transform": [True]}, TypeError, "layers_to_transform"),
    ({"layers_pattern": "layers"}, ValueError, "layers_to_transform gives none"),
])
def test_blocks_that_do_not_exist_are_refused(fields, error, message):
    net = Stack()
    with unchanged(net), pytest.raises(error, match=message):
        mp.get_pet_model(net, config(["to_q"], **fields))


def test_block_numbers_beside_a_regular_expression_are_refused():
    with pytest.raises(ValueError, match="needs target_modules as a list"):
        config(".*to_q", layers_to_transform=[1])


def test_the_garbage_collector_is_left_as_it_was():
    """Whatever is frozen, such as the tests by conftest.py, stays frozen, and nothing else does."""
    gc.unfreeze()
    try:
        mp.get_pet_model(Attention(), config(["to_q"]))
        assert gc.isenabled() and not gc.get_freeze_count()
        gc.collect()
        gc.freeze()
        mp.get_pet_model(Attention(), config(["to_q"]))
        assert gc.isenabled() and gc.get_freeze_count()
        gc.disable()
        mp.get_pet_model(Attention(), config(["to_q"]))
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.freeze()
